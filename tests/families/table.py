"""Every tree under every reader, as a table that is committed."""

from collections import Counter
from pathlib import Path

from . import judge

RESULTS = Path(__file__).parent / "results.txt"
READERS = ("detect", "unrolled")


def rows(names=()):
    """`(case, {reader: verdict})` of all, or of those whose name has one of `names`."""
    return [
        (case, judge.verdicts(case))
        for case in judge.cases()
        if not names or any(name in case.name for name in names)
    ]


def written(judged):
    """The text of the table, with its totals."""
    lines, totals = [], Counter()
    for case, verdicts in judged:
        words = {name: verdict.word for name, verdict in verdicts.items()}
        for name, word in words.items():
            totals[kind(case, name), word] += 1
        others = [name for name in words if name not in READERS]
        calls = [f"{words[name]} {name}" for name in others]
        cells = "".join(f"{words[name]:9}" for name in READERS)
        lines.append(f"{case.name:52}{cells}{'; '.join(calls)}".rstrip())
    head = f"{'tree':52}{'detect':9}{'unrolled':9}presets and misuses"
    words = ("right", "loud", "partly", "wrong")
    sums = [
        f"{of:10}" + ", ".join(f"{totals[of, word]} {word}" for word in words)
        for of in (*READERS, "preset", "misuse")
    ]
    return "\n".join([head, *lines, "", *sums]) + "\n"


def kind(case, reader):
    if reader in READERS:
        return reader
    return "preset" if reader in case.presets else "misuse"


def main(arguments):
    names = [name for name in arguments if not name.startswith("--")]
    judged = rows(names)
    text = written(judged)
    print(text, end="")
    if "--why" in arguments:
        for case, verdicts in judged:
            for name, verdict in verdicts.items():
                if verdict.word != "right":
                    why = "\n    ".join(verdict.why.splitlines())
                    print(f"\n{case.name}, {name}: {verdict.word}\n    {why}")
    if "--write" in arguments:
        RESULTS.write_text(text)
