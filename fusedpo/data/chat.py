"""What a chat template writes of a row, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fusedpo.checks import bad_value
from fusedpo.data.messages import CALLS, THOUGHTS, Message, first_line
from fusedpo.data.rows import Preference


def rendered(row: Preference, tokenizer: Any) -> tuple[str, str, str]:
    """The three texts that are tokenized: the prompt, and the prompt with each response."""
    if isinstance(row.prompt, str):
        assert isinstance(row.chosen, str) and isinstance(row.rejected, str), "one kind a row"
        return row.prompt, row.prompt + row.chosen, row.prompt + row.rejected
    if tokenizer.chat_template is None:
        raise bad_value(
            row.where,
            "text, as the tokenizer has no chat template",
            "messages",
            "give prompt, chosen and rejected as strings, or a model with a chat template",
        )

    prompt = row.prompt

    def text(messages: list[Message], generation: bool = False, **changes: Any) -> str:
        options = {**row.template, **changes, "add_generation_prompt": generation}
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:
            got = f"a refusal: {first_line(error)}"
            raise bad_value(row.where, "messages that the chat template accepts", got) from error

    chosen, rejected = text([*prompt, *row.chosen]), text([*prompt, *row.rejected])
    for name in ("tools", "documents"):
        if row.template.get(name) and _same(chosen, text, [*prompt, *row.chosen], **{name: None}):
            raise _left_out(row, name)
    if chosen == rejected and _trimmed(row.chosen) != _trimmed(row.rejected):
        raise _left_out(row, "what messages say")  # as one for parts of messages does to text
    for response, whole in ((row.chosen, chosen), (row.rejected, rejected)):
        _check_messages(row, response, whole, text)
    return text(prompt, True), chosen, rejected


def _trimmed(response: Any) -> list[dict[str, Any]]:
    """Messages without the blanks around their texts, which some chat templates leave out."""
    return [
        {key: value.strip() if isinstance(value, str) else value for key, value in each.items()}
        for each in response
    ]


def _check_messages(row: Preference, response: Any, whole: str, text: Callable[..., str]) -> None:
    """Refuse a chat template that passes over what a message says beside its content."""
    messages = [*row.prompt, *response]
    # what was thought of in earlier turns may be left out
    for kind, part in ((CALLS, messages), (THOUGHTS, response)):
        names = {name for name in kind for message in part if message.get(name)}
        without = [{k: v for k, v in m.items() if k not in kind} for m in messages]
        if names and _same(whole, text, without):
            raise _left_out(row, " and ".join(sorted(names)))


def _same(whole: str, text: Callable[..., str], messages: Sequence[Any], **changes: Any) -> bool:
    """Whether the template writes the same of other messages; it may refuse them."""
    try:
        return text(messages, **changes) == whole
    except ValueError:
        return False


def _left_out(row: Preference, name: str) -> ValueError:
    return bad_value(
        row.where,
        f"a chat template that writes {name}",
        "one that leaves them out",
        "take another template, or leave them out of the row",
    )
