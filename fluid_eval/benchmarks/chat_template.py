"""Conversations: prompts by the tokenizer's chat template, and which part of an answer is thinking.

Prompts are those of lm-eval's apply_chat_template; only what it leaves to the backend is here.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

from fluid_model.common.errors import ConfigError
from fluid_model.common.files import Nested
from fluid_model.tokens import THINK_ENDS, Tokenizer, think_end

from ..common.spec import ChatSpec
from ..results.run_folder import Record

MARK = "qz7turn"
"""Begins a text that no template writes of itself."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template under a run's settings. end_of_thinking: as set, or found in the vocabulary, or None."""

    tokenizer: Tokenizer
    settings: ChatSpec
    template: str
    end_of_thinking: str | None
    _whole: set[tuple[str, ...]] = field(default_factory=set, repr=False, compare=False)
    """Roles of conversations that the template is known to write out whole."""

    @property
    def cut(self) -> str | None:
        """The text up to which an answer is thought and not read; None where all of it is read."""
        return self.end_of_thinking if self.settings.thinking and not self.settings.read_thoughts else None

    @property
    def system_turn(self) -> list[dict[str, str]]:
        """What a conversation begins with: the system prompt, where the run sets one."""
        return [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without a generation prompt the last turn, an answer's beginning, stays open.

        Raises ConfigError where the template refuses the conversation or the variables, or leaves one of the turns out.
        """
        turns = [dict(turn) for turn in messages]
        question = next(turn for turn in reversed(turns) if turn["role"] == "user")
        question["content"] += self.settings.suffix
        roles = (*(turn["role"] for turn in turns), str(add_generation_prompt))
        if roles not in self._whole:
            marked = [{**turn, "content": f"{MARK}{place}z"} for place, turn in enumerate(turns)]
            self._check(self._write(marked, add_generation_prompt), marked, marked)
            self._whole.add(roles)
        prompt = self._write(turns, add_generation_prompt)
        self._check(prompt, turns, [question])
        return prompt

    def _check(self, prompt: str, turns: list[dict[str, str]], wanted: list[dict[str, str]]) -> None:
        """Raise ConfigError unless a prompt holds these of its turns; spaces around them are the template's."""
        for turn in wanted:
            text = turn["content"].strip()
            if text not in prompt and json.dumps(text)[1:-1] not in prompt:
                place = next(place for place, each in enumerate(turns, 1) if each is turn)
                way = "; examples in one turn: --set chat.multiturn=false" if place < len(turns) - 1 else ""
                raise ConfigError(
                    f"chat: the model's template leaves out turn {place} of {len(turns)} ({turn['role']}), so that the "
                    f"prompt would not hold what is asked; mend the template, or leave --chat out{way}"
                )

    def _write(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation by the template."""
        try:
            prompt = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.settings.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **{"enable_thinking": self.settings.thinking, **self.settings.variables},
            )
        except Exception as error:  # a template is somebody's program, and fails as it likes
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
            raise ConfigError(f"chat: the model's template refuses a conversation of {roles} turns: {error}") from error
        return str(prompt)

    def describe(self) -> Nested:
        """For the result: the settings, the end of thinking that was used, and which template (by its hash)."""
        template = hashlib.sha256(self.template.encode()).hexdigest()[:12]
        told = {**asdict(self.settings), "end_of_thinking": self.cut, "template": template}
        if not self.settings.read_thoughts:  # results from before there was any keep their protocol's hash
            del told["read_thoughts"]
        return told

    def notices(self, records: Iterable[Record]) -> list[str]:
        """What a reader must know of answers that did not end their thinking, or thought unasked, by task."""
        if self.settings.read_thoughts:
            return []
        written = [record for record in records if record["finish"] is not None]
        if self.settings.thinking:
            found, of = _count(r for r in written if not r["thinking_ended"]), _count(written)
            tell = "never ended their thinking and count as empty; a larger --max-new-tokens gives them room"
        else:
            end = self.end_of_thinking
            found = _count(r for r in written if end and end in self.tokenizer.decode(r["output_ids"]))
            of = _count(written)
            tell = f"hold {end}: the model thinks all the same, and its thoughts are scored; --set chat.thinking=true"
        return [f"{task}: {count} of {of[task]} answers {tell}" for task, count in found.items()]


def open_chat(settings: ChatSpec | None, tokenizer: Tokenizer, model: str) -> Chat | None:
    """The conversation a run asks for. Raises ConfigError where the tokenizer has no template, or no known end of
    thinking although the model is to think.
    """
    if settings is None:
        return None
    if isinstance(names := tokenizer.chat_template, dict) and (settings.template or "default") not in names:
        raise ConfigError(
            f"chat.template={settings.template}: {model} has chat templates by name: {', '.join(sorted(names))}; "
            "--set chat.template=NAME picks one"
        )
    if settings.template is not None and not isinstance(names, dict):
        raise ConfigError(f"chat.template={settings.template}: {model} has no chat templates by name; leave it out")
    try:
        template = str(tokenizer.get_chat_template(settings.template))
    except ValueError:
        raise ConfigError(
            f"chat: {model} has no chat template; leave --chat out, as for any base model, or put its "
            "chat_template.jinja into the folder"
        ) from None
    end = settings.end_of_thinking or think_end(tokenizer)
    if settings.thinking and end is None and not settings.read_thoughts:
        raise ConfigError(
            f"chat.thinking=true: {model} has no token known to end thinking ({', '.join(THINK_ENDS)}); "
            "name the text that does: --set chat.end_of_thinking=TEXT"
        )
    return Chat(tokenizer, settings, template, end)


def _count(records: Iterable[Record]) -> Counter[str]:
    return Counter(record["task"] for record in records)
