"""Lets root run a program that refuses to run as root."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

from anynode.server.errors import ConfigurationError


def as_owner(directory: Path) -> list[str]:
    """Return the command prefix that runs a command as the owner of the directory if this process is root.

    Postgres refuses to run as root. As another user it could not reach a directory below, say, a /root of mode 0700,
    and opening that to everybody (as the wheel's own launcher does) is no option: so it keeps the one capability to
    pass through. Postgres also looks for its own files with access(), which ignores capabilities unless
    no_setuid_fixup is set.
    """
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        raise ConfigurationError("PostgreSQL does not run as root: run as a normal user or install util-linux.")
    owner = directory.stat()
    return [
        "setpriv",
        f"--reuid={owner.st_uid}",
        f"--regid={owner.st_gid}",
        "--clear-groups",
        "--inh-caps=-all,+dac_override",
        "--ambient-caps=-all,+dac_override",
        "--securebits=+no_setuid_fixup",
    ]


def give_to_nobody(directory: Path) -> None:
    """Where this process is root, let the directory belong to a user that is not."""
    if os.geteuid() != 0:
        return
    try:
        nobody = pwd.getpwnam("nobody")
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    except KeyError:
        os.chown(directory, 65534, 65534)
