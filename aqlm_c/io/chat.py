"""What a line of a .jsonl file holds as text: plain text, a conversation, or an instruction with its answer."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import is_text, one_line

EXPECTED = 'a JSON object with a string "text", with "messages", or with "instruction" and "output"'


class Document(NamedTuple):
    """A text. ended: by a chat template, so that the next one follows at once, not after a blank line."""

    text: str
    ended: bool = False


def document_of(fields: Any, tokenizer: Any) -> Document:
    """The text of an object that a line of JSON holds.

    "text" is taken as it is. "messages", a list of objects with "role" and "content", goes through the tokenizer's chat
    template; so do "instruction", "input" (which may be missing) and "output", as a user's message and its answer. A
    tokenizer without a template has those three with blank lines between them. Raises ValueError, which says what was
    expected, for anything else, for messages where there is no template and for a template that fails.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"expected {EXPECTED}")
    given = {name for name in ("text", "messages", "instruction") if fields.get(name) is not None}
    if "text" in given and isinstance(fields["text"], str):
        found = Document(fields["text"])
    elif given == {"instruction"}:
        found = _instruction(fields, tokenizer)
    elif "messages" in given and "text" not in given:
        found = _conversation(_messages(fields["messages"]), tokenizer)
    else:
        raise ValueError(f"expected {EXPECTED}")
    if not is_text(found.text):
        raise ValueError("got half of a character, expected Unicode text")
    return found


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages": expected a list of objects with "role" and "content"')
    return [_message(number, message) for number, message in enumerate(messages, 1)]


def _message(number: int, message: Any) -> dict[str, Any]:
    """A message whose content is one text: the parts of text that others make of it are joined."""
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {number}: expected an object with a "role" and a "content" of text')
    return {**message, "content": content}


def _instruction(fields: dict[str, Any], tokenizer: Any) -> Document:
    given = fields.get("input")
    parts = [fields["instruction"], "" if given is None else given, fields.get("output")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError('expected strings as "instruction", "output" and, where it is given, "input"')
    *question, answer = parts
    user = "\n\n".join(filter(None, question))
    if not getattr(tokenizer, "chat_template", None):
        return Document(f"{user}\n\n{answer}")
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return _conversation(messages, tokenizer)


def _conversation(messages: list[dict[str, Any]], tokenizer: Any) -> Document:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError('got "messages", expected "text": the tokenizer has no chat template')
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"the tokenizer's chat template fails: {one_line(error)}") from error
    return Document(str(text), ended=True)
