"""One clean run: does it answer, say and do what the contract wants, and nothing else?

docs/contract.md, "What a driver says".
"""

from __future__ import annotations

import re

from madrigal.conformance import world
from madrigal.conformance.answers import TOKEN
from madrigal.conformance.calls import Run
from madrigal.conformance.kit import describe
from madrigal.conformance.plugin import ALL, Case, each, known_actions, scene_of
from madrigal.conformance.scenes import Wrong
from madrigal.conformance.stage import SECRET
from madrigal.conformance.subject import Subject

_TAGGED = re.compile(r"(ERROR|WARN|INFO|DEBUG): [\w.-]+: \S")
MARKS = ["ERROR MESSAGE --8<------", "ERROR MESSAGE ------>8--"]


@each(quick=ALL)
def test_answer(case: Case) -> None:
    """Status 0 and exactly the answer; on failure, where one is due, another status and no answer."""
    seen = case.observe()
    run, play = seen.run, seen.play
    if run.hung:
        raise Wrong(f"{run.call.action} hangs: it had to be ended after {run.seconds:.0f} s")
    if scene_of(case).fails:
        if run.status == 0:
            raise Wrong("it has to fail\n  expected: another status than 0\n  seen:     status 0, a false success")
        if run.stdout:
            raise Wrong(f"an answer although it fails\n  expected: nothing on stdout\n  seen:     {run.stdout[:300]!r}")
        return
    if run.status:
        raise Wrong(f"it fails\n  expected: status 0\n  seen:     status {run.status}: {run.message[:600]}")
    answer = run.stdout.removesuffix("\n")
    if not re.fullmatch(play.answer, answer):
        raise Wrong(f"the answer\n  expected: {play.answer or 'nothing'}\n  seen:     {run.stdout[:300]!r}")


@each(quick=ALL)
def test_words(case: Case) -> None:
    """stderr: tagged lines, and on failure exactly one untagged line, the last; in 3.4 it is between marks."""
    seen = case.observe()
    _words(case, seen.run, bool(seen.wrong))


def _words(case: Case, run: Run, is_wrong: bool) -> None:
    """The same of RUN; IS_WRONG: whether another check has something to say about what it did."""
    lines = run.stderr.splitlines()
    action = run.call.action.partition(".")[0]
    if "Traceback (most recent call last)" in run.stderr:
        raise Wrong(f"a traceback is shown\n  expected: one sentence\n  seen:     {run.stderr[-600:]}")
    if lines and not run.stderr.endswith("\n"):
        raise Wrong(f"the last line has no end: {lines[-1][:200]!r}")
    plain = [line for line in lines if not _TAGGED.match(line)]
    if run.status == 0:
        if plain:
            raise Wrong(f"untagged lines on success\n  expected: none\n  seen:     {plain[:5]}")
        wrong = [line for line in lines if line.startswith("ERROR")]
        if wrong and not is_wrong:
            raise Wrong(f"it logs an error although it works\n  expected: no ERROR line\n  seen:     {wrong[:3]}")
        return
    if case.subject.is_old:
        if plain[:1] != MARKS[:1] or plain[-1:] != MARKS[1:]:
            raise Wrong(f"the message is not between marks\n  expected: {MARKS}\n  seen:     {plain[:5]}")
        plain = plain[1:-1]
    if len(plain) != 1 or (not case.subject.is_old and lines[-1] != plain[0]):
        raise Wrong(f"the message of {action}\n  expected: one untagged line, the last\n  seen:     {lines[-6:]}")


@each(quick=ALL)
def test_content(case: Case) -> None:
    """What was to be made holds what it should, by digest."""
    seen = case.observe()
    if seen.wrong:
        raise Wrong(seen.wrong)
    if not scene_of(case).fails and seen.run.status:
        raise Wrong(f"it fails: {seen.run.message[:600]}")


@each(quick=ALL)
def test_leftovers(case: Case) -> None:
    """No file, mount or process stays that is not the result."""
    seen = case.observe()
    changes = case.kit.unexpected(seen.play, seen.before, seen.after, seen.run)
    made = [change for change in changes if change.startswith(("made ", "mounted "))]
    if made:
        raise Wrong(f"left over\n  expected: nothing but the result\n  seen:\n{describe(made)}")
    if seen.left:
        raise Wrong(
            f"still running {world.SETTLED:.0f} s after its end\n  expected: nothing\n  seen:\n{describe(seen.left)}"
        )


@each(quick=ALL)
def test_source_untouched(case: Case) -> None:
    """What is only read stays as it is."""
    seen = case.observe()
    changes = {change.split(" ", 1)[1]: change for change in seen.before.changes(seen.after)}
    touched = [changes[path] for path in seen.play.sources if path in changes]
    if touched:
        raise Wrong(f"what was only to be read\n  expected: as before\n  seen:\n{describe(touched)}")


@each(quick=ALL)
def test_bystanders(case: Case) -> None:
    """Other images, disks and VMs stay as they are."""
    seen = case.observe()
    changes = case.kit.unexpected(seen.play, seen.before, seen.after, seen.run)
    gone = [change for change in changes if change.startswith(("removed ", "changed ", "unmounted "))]
    if gone:
        raise Wrong(f"what it has nothing to do with\n  expected: as before\n  seen:\n{describe(gone)}")


@each(quick=ALL)
def test_secrets(case: Case) -> None:
    """No secret of the dump or the front-end is in the arguments of a program, in a log line or in a message."""
    seen = case.observe()
    if seen.run.told:
        raise Wrong(
            f"a secret is in the arguments of a program\n  expected: nowhere\n  seen:\n{describe(seen.run.told)}"
        )
    for secret in (SECRET, TOKEN):
        if secret in seen.run.stderr or secret in seen.run.stdout:
            raise Wrong(f"a secret is in what it says\n  expected: nowhere\n  seen: {seen.run.stderr[:500]}")


def _refused(subject: Subject) -> list[str]:
    return [action for action in known_actions(subject) if subject.refuses(action)]


@each(quick=ALL, what=_refused)
def test_refuses(case: Case) -> None:
    """What a driver says it cannot do fails, with a message, and changes nothing."""
    from madrigal.conformance import scenes_datastore, scenes_idle

    stage = case.empty()
    plain = scenes_idle.plain if case.subject.kind == "tm" else scenes_datastore.plain
    call = plain(stage, case.word)
    before = case.kit.look()
    run = stage.run(call)
    if run.status == 0:
        raise Wrong(
            "what the driver cannot do\n  expected: another status than 0\n  seen:     status 0, a false success"
        )
    _words(case, run, False)
    if run.stdout:
        raise Wrong(f"an answer although it fails\n  expected: nothing on stdout\n  seen:     {run.stdout[:300]!r}")
    if changes := before.changes(case.kit.look()):
        raise Wrong(f"it changes something\n{describe(changes)}")
