"""How an action can be broken: functions that give the shell script to have in its place.

A script does what is right, which is $real, and then something that is wrong; or less than what is right.
"""

from __future__ import annotations

from collections.abc import Callable

from madrigal.conformance.subject import Subject


class Harmless(Exception):
    """Why a breakage is none for an action."""


# -- what a script finds ---------------------------------------------------------------------------------------------

_OF_DIRECTORY = "case $%d in */disk.*) disk=$%d ;; *) disk=${%d%%/}/disk.0 ;; esac"
_LAST = 'n=$#; [ "${MADRIGAL_CONTRACT:-}" = 3.4 ] || n=$((n - 2)); disk=${!n}'
_DISK = {
    **dict.fromkeys(("clone", "ln"), "disk=$2"),
    "mv": _OF_DIRECTORY % (2, 2, 2),
    **dict.fromkeys(("mvds", "cpds", "resize"), "disk=$1"),
    **dict.fromkeys(("snap_create", "snap_create_live", "snap_revert", "snap_delete"), "disk=$1"),
    "delete": _OF_DIRECTORY % (1, 1, 1),
    "mkimage": "disk=$3",
    "mkswap": "disk=$2",
    "context": _LAST,
    **dict.fromkeys(("premigrate", "failmigrate"), "disk=$1:${3%/}/disk.0"),
    "postmigrate": "disk=$2:${3%/}/disk.0",
    **dict.fromkeys(("prebackup", "prebackup_live", "postbackup", "postbackup_live", "restore"), "disk=${1%/}/disk.0"),
}
"""HOST:PATH of the disk that an action of a transfer driver is about."""

_PREFACE = """#!/bin/bash
real=%s; %s
datastores=$ONE_LOCATION/var/datastores
# on HOST:PATH 'a script about $f'
on() { ssh "${1%%%%:*}" "f=${1#*:}; $2" </dev/null >/dev/null 2>&1; }
# element NAME: what the dump in $dump has as that
element() { base64 -d <<<"$dump" | sed -nE "s/.*<$1>(<!\\[CDATA\\[)?([^]<]*).*/\\2/p" | head -1; }
"""


def preface(driver: str, action: str, real: str) -> str:
    """What a broken ACTION of DRIVER begins with, the right one of which is REAL."""
    return _PREFACE % (real, _DISK.get(_base(action), ":") if driver.startswith("tm/") else ":")


def _base(action: str) -> str:
    return action.partition(".")[0]


def _after(then: str) -> str:
    """What is right, and THEN something more, before the answer is given."""
    return f"""given=$(cat); dump=${{given:-$1}}
answer=$("$real" "$@" <<<"$given"; echo "x$?"); status=${{answer##*x}}; answer=${{answer%x*}}; answer=${{answer%$'\\n'}}
{then}
[ -z "$answer" ] || printf '%s\\n' "$answer"
exit $status"""


def _on_disk(script: str) -> str:
    return _after(f"on \"$disk\" '{script}'")


def _is_idle(subject: Subject, action: str) -> bool:
    """Whether it has nothing to do."""
    return subject.is_idle(action) or (subject.name, action) == ("dummy", "restore")


def _answers(subject: Subject, action: str) -> bool:
    if subject.refuses(action) or _is_idle(subject, action):
        return False
    if subject.kind == "tm":
        return action.startswith("monitor")
    return action != "rm" and not action.startswith("snap_")


def _has_disks(subject: Subject, action: str) -> bool:
    """Whether it is about files."""
    return subject.is_files and not (subject.refuses(action) or _is_idle(subject, action))


# -- the five --------------------------------------------------------------------------------------------------------


def does_nothing(subject: Subject, action: str) -> str:
    if _is_idle(subject, action):
        raise Harmless("it has nothing to do")
    if subject.is_shared and action in ("premigrate", "failmigrate"):
        raise Harmless("on shared storage it only runs what other drivers have for it, and here are none")
    return "cat >/dev/null; exit 0"


_CUT = '[ -f "$f" ] && f=$(readlink -f "$f") && truncate -s -65536 "$f"'


def truncates(subject: Subject, action: str) -> str:
    """Cut off what it makes, or leaves; of an answer, the end."""
    base = _base(action)
    if _answers(subject, action) and (not subject.is_files or action not in ("cp", "clone", "mkfs")):
        if subject.name == "dummy" and action in ("clone", "mkfs", "stat"):
            raise Harmless("what it answers is made up, and the beginning of that is no worse")
        return _after("answer=${answer:0:$((${#answer} / 2))}")
    if not _has_disks(subject, action) or base in ("delete", "rm"):
        raise Harmless("it makes nothing with bytes of its own")
    if subject.kind == "datastore":
        return _after(f"{'f=$(element SOURCE)' if action.startswith('snap_') else 'f=${answer%% *}'}; {_CUT}")
    if base in ("mvds", "cpds"):
        return _after(f"f=$2; {_CUT}")
    if base == "snap_create":
        return _on_disk(f'[ ! -f "$f.snap/0" ] || f=$f.snap/0; {_CUT}')
    return _on_disk(_CUT)


def answers_another_format(subject: Subject, action: str) -> str:
    """raw for qcow2 and the other way round, and other numbers."""
    if not _answers(subject, action):
        raise Harmless("it answers nothing")
    if action in ("cp", "clone", "mkfs") and (not subject.is_files or (action == "mkfs" and not subject.is_old)):
        return _after('answer="$answer of several words"')
    if not subject.is_files:  # the numbers are made up
        return _after("answer=$(sed 's/IMPORT_INFO/INFO/; s/[0-9]/x/g' <<<\"$answer\")")
    if action in ("cp", "clone", "mkfs"):
        swap = "sed 's/raw$/Q/; s/qcow2$/raw/; s/Q$/qcow2/' <<<\"$answer\""
        return _after(f"answer=$({swap} | awk '{{ if ($NF ~ /^[0-9]+$/) $NF += 1; print }}')")
    return _after("answer=$(sed -E 's/[0-9]+/1&/g' <<<\"$answer\")")


def makes_another_format(subject: Subject, action: str) -> str:
    """What is made is a qcow2 image where a raw one is due, and the other way round."""
    base = _base(action)
    convert = (
        'if [ -f "$f" ]; then f=$(readlink -f "$f"); t=$f.t; o=qcow2; [ "$(head -c 3 "$f")" != QFI ] || o=raw; '
        'qemu-img convert -U -O $o "$f" "$t" && cat "$t" >"$f"; rm -f "$t"; fi'
    )
    if _has_disks(subject, action):
        if subject.kind == "datastore" and action in ("cp", "clone", "mkfs"):
            return _after(f"f=${{answer%% *}}; {convert}")
        if subject.kind == "datastore" and action in ("snap_revert", "snap_flatten"):
            return _after(f"f=$(element SOURCE); {convert}")
        if subject.kind == "tm" and base in ("mvds", "cpds"):
            return _after(f"f=$2; {convert}")
        if subject.kind == "tm" and base in ("clone", "ln", "mv", "mkimage", "snap_revert", "resize"):
            return _on_disk(convert)
    raise Harmless("it makes no image")


def leaves_a_file(subject: Subject, action: str) -> str:
    return _after("echo x >/tmp/left-over")


def leaves_a_file_beside(subject: Subject, action: str) -> str:
    """Beside what it makes or removes, under a name that begins as that does."""
    if subject.kind == "datastore":
        if not subject.is_files:
            return _after('echo x >"$datastores/1/left-over"')
        if action in ("cp", "clone", "mkfs"):
            return _after('[ -z "$answer" ] || echo x >"${answer%% *}.tmp"')
        return _after('f=$(element SOURCE); [ -n "$f" ] || f=$datastores/1/image; echo x >"$f.tmp"')
    if action == "monitor":
        return _after('echo x >"$datastores/100/left-over"')
    if action == "monitor_ds":
        return _after('echo x >"$1/17/disk.0.tmp"')
    if _base(action) in ("mvds", "cpds"):
        return _after('f=$2; mkdir -p "${f%/*}"; echo x >"$f.tmp"')
    return _on_disk('mkdir -p "${f%/*}"; echo x >"$f.tmp"')


def removes_too_much(subject: Subject, action: str) -> str:
    """What is another's: an image, the disk of another VM."""
    if subject.kind == "datastore" or action == "monitor":
        return _after('find "$datastores" -name "bystander*" -delete')
    if action == "monitor_ds":
        return _after('rm -rf "$1/18"')
    return _on_disk('rm -rf "${f%/*/*}/18"')


def removes_what_is_beside(subject: Subject, action: str) -> str:
    """Other disks of the VM, other snapshots."""
    base = _base(action)
    if subject.kind == "datastore":
        if action == "snap_delete" and subject.is_files:
            return _after('f=$(element SOURCE); rm -f "$f.snap/1"')
        raise Harmless("it is the same as to remove what is another's")
    if base in ("mv", "premigrate", "postmigrate", "failmigrate"):
        raise Harmless("all that is beside goes with it")
    if action not in _DISK and base not in _DISK:
        raise Harmless("it is the same as to remove what is another's")
    if subject.refuses(action) or _is_idle(subject, action):
        raise Harmless("it is not asked where there is something beside")
    if action == "delete":
        return _after('case $1 in */disk.*) on "$disk" \'rm -rf "${f%/*}"\' ;; esac')
    if action == "snap_delete":
        return _on_disk(_SNAPSHOT % {"number": 1})
    return _on_disk('find "${f%/*}" -mindepth 1 -maxdepth 1 ! -name "${f##*/}*" -exec rm -rf {} +')


_SNAPSHOT = """g=$(readlink -f "$f")
for s in "$f.snap/%(number)s" "$g.snap/%(number)s"; do [ "$s" -ef "$f" ] || rm -f "$s"; done"""


def removes_its_source(subject: Subject, action: str) -> str:
    base = _base(action)
    if _has_disks(subject, action):
        if subject.kind == "datastore":
            if action in ("cp", "clone", "stat"):
                return _after('rm -f "$(element PATH)"')
            if action == "export":
                return _after('rm -f "$(element SOURCE)"')
            if action == "snap_revert":
                return _after('rm -f "$(element SOURCE).snap/1"')
        elif base in ("clone", "ln"):
            return _after('rm -f "${1#*:}"')
        elif base == "cpds":
            return _on_disk('rm -f "$(readlink -f "$f")"')
        elif base == "context":
            return _after('for f; do case $f in /*) rm -f "$f" ;; esac; done')
        elif base == "snap_revert":
            return _on_disk(_SNAPSHOT % {"number": 0})
    raise Harmless("it has no source that stays")


# -- and some more ---------------------------------------------------------------------------------------------------


def says_too_much(subject: Subject, action: str) -> str:
    return _after("answer=$answer${answer:+$'\\n'}surprise")


def answers_and_makes_nothing(subject: Subject, action: str) -> str:
    if subject.kind == "tm" or action not in ("cp", "clone", "mkfs") or not _has_disks(subject, action):
        raise Harmless("it has no answer that names what it made")
    return _after('rm -rf "${answer%% *}"')


def swallows_failures(subject: Subject, action: str) -> str:
    return '"$real" "$@" 2>/dev/null; exit 0'


def fails(subject: Subject, action: str) -> str:
    """Although nothing is wrong."""
    if subject.refuses(action):
        raise Harmless("it has to fail")
    return 'cat >/dev/null; echo "it does not work" >&2; exit 1'


def says_untagged_words(subject: Subject, action: str) -> str:
    return _after('echo "all is well" >&2')


def takes_no_moment(subject: Subject, action: str) -> str:
    """A copy of a disk while its guest goes on writing to it."""
    if action != "snap_create_live" or subject.refuses(action):
        raise Harmless("it is not about VMs that run")
    return _on_disk('for s in "$f.snap/0" "$(readlink -f "$f").snap/0"; do cat "$f" >"$s"; done')


def leaves_the_guest_suspended(subject: Subject, action: str) -> str:
    if action != "snap_create_live" or subject.refuses(action):
        raise Harmless("it is not about VMs that run")
    return _on_disk("virsh suspend one-17")


ALL: dict[str, Callable[[Subject, str], str]] = {
    one.__name__.replace("_", " "): one
    for one in (
        does_nothing,
        says_too_much,
        truncates,
        answers_another_format,
        makes_another_format,
        leaves_a_file,
        leaves_a_file_beside,
        removes_too_much,
        removes_what_is_beside,
        removes_its_source,
        answers_and_makes_nothing,
        swallows_failures,
        fails,
        says_untagged_words,
        takes_no_moment,
        leaves_the_guest_suspended,
    )
}
