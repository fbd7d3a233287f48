"""What stages made of one prompt under the same noise, aligned for the terminal; report.py shows it on a page."""

from collections.abc import Iterator

from kforcing_jax.evaluation.tables import in_order

# Characters of a sample on one line, next to its label.
_WIDTH = 96


def samples_text(summary: dict) -> str:
    """The continuations of each prompt under the same noise, below each other, character under character.

    A caret is under the first character that differs from the AR teacher's. Scripts whose characters are wider than
    one column do not align.
    """
    return "\n\n".join(_sample_text(sample) for sample in summary.get("samples") or [])


def _sample_text(sample):
    lines = [prompt_text(sample)]
    for block in sample_blocks(sample):
        for label, text, same in block:
            lines.append(f"{label}  {text}")
            if 0 <= same < len(text):
                lines.append(" " * (len(label) + 2 + same) + "^")
        lines.append("")
    return "\n".join(lines).rstrip()


def prompt_text(sample: dict) -> str:
    """The heading of a sample: its prompt on one line, and the seed of its noise."""
    return f"Prompt (noise seed {sample.get('seed', '-')}): {one_line(sample.get('prompt') or '')}"


def sample_blocks(sample: dict) -> Iterator[list[tuple[str, str, int]]]:
    """Blocks of lines of all stages together: (padded label, characters, place of the first difference from AR).

    That place is negative on lines after it, and beyond the end of those before. Long texts are wrapped; those that
    have ended have no more lines.
    """
    given = in_order(sample.get("continuations") or {})
    texts = {name: one_line(text or "") or "(end)" for name, text in given.items()}
    width = max(map(len, texts), default=0)
    same = {name: _common(text, texts.get("ar", text)) for name, text in texts.items()}
    for start in range(0, max(map(len, texts.values()), default=0), _WIDTH):
        yield [
            (f"{name:<{width}}", text[start : start + _WIDTH], same[name] - start)
            for name, text in texts.items()
            if text[start:]
        ]


def _common(text, other):
    """How many characters two texts begin with together."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def one_line(text: str) -> str:
    """Character for character, visible: text can hold line breaks, and escape sequences that terminals obey."""
    visible = text.replace("\n", "⏎").replace("\t", " ")
    return "".join(character if character.isprintable() else "·" for character in visible)
