"""`make hostile`: attacks on a node of its own, each bounded in count and time, with a bound for what each may cost.

`attacks` lists them. `strike` runs one: a node, an ordinary user (`bystander`) and the attack (`attacker`), each a
process of its own, because an attack must not slow down the clock that measures it. `figures` compares with the bounds.
"""
