"""Conversations: what the usual formats of instruction data hold, as messages of a role and a text."""

from collections.abc import Iterable, Mapping
from typing import Any

# {"role": ..., "content": ...}, and OpenAI's "weight" where it is given: 0 says that an answer is not to be learnt.
Message = dict[str, Any]

FIELDS = ("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "system")
KNOWN = "messages, conversations, prompt and completion, or instruction and output"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class Unusable(Exception):
    """Why a record cannot be used: what it is counted under."""


def holds_conversation(fields: Iterable[str]) -> bool:
    """Whether fields of these names hold a conversation in a known format."""
    alternatives = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"})
    return any(names <= set(fields) for names in alternatives)


def conversation_of(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a record: `messages` (OpenAI, Hugging Face), `conversations` (ShareGPT), `prompt` and
    `completion` (texts or messages), or `instruction`, `input` and `output` (Alpaca); `system` comes before them.

    Raises:
      Unusable: it holds none, or one that cannot be read; the reason is the message.
    """
    if "messages" in record or "conversations" in record:
        turns = _turns(record["messages" if "messages" in record else "conversations"], "")
    elif "prompt" in record and "completion" in record:
        turns = [*_turns(record["prompt"], "user"), *_turns(record["completion"], "assistant")]
    elif "instruction" in record and "output" in record:
        asked = [part for part in (record["instruction"], record.get("input")) if part]
        if not all(isinstance(part, str) for part in asked):
            raise Unusable("an instruction that is no text")
        turns = [*_turns("\n\n".join(asked), "user"), *_turns(record["output"], "assistant")]
    else:
        raise Unusable(f"no conversation ({KNOWN})")
    messages = [_message(turn) for turn in turns]
    if record.get("system") and messages and messages[0]["role"] != "system":
        messages.insert(0, _message({"role": "system", "content": record["system"]}))
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant's message")
    return messages


def plain_text(messages: Iterable[Message]) -> str:
    """What was said, without who said it."""
    return "\n\n".join(message["content"] for message in messages if message["content"].strip())


def _turns(value: Any, role: str) -> list[Any]:
    """A list of messages, or one text as the only message of a role."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if isinstance(value, Mapping):
        # TFDS gives a sequence of messages as a sequence of each of their fields.
        try:
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
        except (TypeError, ValueError) as error:
            raise Unusable("a conversation that is no list of messages") from error
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise Unusable("a conversation that is no list of messages")
    return list(value)


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise Unusable("a message that is no object")
    if turn.get("tool_calls"):
        raise Unusable("tool calls, which are not read")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(role, bytes) and isinstance(content, bytes):
        role, content = role.decode(), content.decode()
    if not isinstance(role, str) or not isinstance(content, str):
        raise Unusable("a message without a role or a text")
    message = {"role": SHAREGPT_ROLES.get(role, role), "content": content}
    return message | ({} if turn.get("weight") is None else {"weight": turn["weight"]})
