"""Chat runs: prompts by the tokenizer's chat template, and the split of an answer into thinking and text.

lm-eval's apply_chat_template builds the turns; this module does the part that it leaves to the model backend:

    [{"role": "user", "content": "Question: …"}]  ──render──▶  "<|im_start|>user\\nQuestion: …<|im_end|>\\n…"

Templates may drop turns without an error, so each rendered prompt is checked to contain them.
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
"""A text that no template contains: turns made of it show whether the template renders all of them."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's template under a run's settings.

    end_of_thinking: as set, else looked up in the vocabulary; None if neither.
    """

    tokenizer: Tokenizer
    settings: ChatSpec
    template: str
    end_of_thinking: str | None
    _checked: set[tuple[str, ...]] = field(default_factory=set, repr=False, compare=False)
    """Role sequences that the template is known to render completely."""

    @property
    def cut(self) -> str | None:
        """The text that ends the thinking, if thinking is cut off before scoring; else None."""
        return self.end_of_thinking if self.settings.thinking and not self.settings.read_thoughts else None

    @property
    def system_turn(self) -> list[dict[str, str]]:
        """The system turn, if the run sets a system prompt."""
        return [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation. Without a generation prompt, the last turn is the start of the answer and stays
        open.

        Raises ConfigError if the template refuses the conversation or a variable, or leaves out a turn.
        """
        turns = [dict(turn) for turn in messages]
        question = next(turn for turn in reversed(turns) if turn["role"] == "user")
        question["content"] += self.settings.suffix
        roles = (*(turn["role"] for turn in turns), str(add_generation_prompt))
        if roles not in self._checked:
            marked = [{**turn, "content": f"{MARK}{place}z"} for place, turn in enumerate(turns)]
            self._check(self._apply(marked, add_generation_prompt), marked, marked)
            self._checked.add(roles)
        prompt = self._apply(turns, add_generation_prompt)
        self._check(prompt, turns, [question])
        return prompt

    def _check(self, prompt: str, turns: list[dict[str, str]], wanted: list[dict[str, str]]) -> None:
        """Raise ConfigError unless a prompt contains the `wanted` turns, white space around them aside."""
        for turn in wanted:
            text = turn["content"].strip()
            if text not in prompt and json.dumps(text)[1:-1] not in prompt:
                place = next(place for place, other in enumerate(turns, 1) if other is turn)
                way = "; examples in one turn: --set chat.multiturn=false" if place < len(turns) - 1 else ""
                raise ConfigError(
                    f"chat: the model's template leaves out turn {place} of {len(turns)} ({turn['role']}); "
                    f"fix the template, or leave --chat out{way}"
                )

    def _apply(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The template applied to turns."""
        try:
            prompt = self.tokenizer.apply_chat_template(
                turns,
                chat_template=self.settings.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **{"enable_thinking": self.settings.thinking, **self.settings.variables},
            )
        except Exception as error:  # templates are programs and may raise anything
            roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
            raise ConfigError(f"chat: the model's template refuses a conversation of {roles} turns: {error}") from error
        return str(prompt)

    def describe(self) -> Nested:
        """For the result: the settings, the end of thinking in use, and the template's hash."""
        template = hashlib.sha256(self.template.encode()).hexdigest()[:12]
        values = {**asdict(self.settings), "end_of_thinking": self.cut, "template": template}
        if not self.settings.read_thoughts:  # a newer field: older results keep their protocol hash
            del values["read_thoughts"]
        return values

    def notices(self, records: Iterable[Record]) -> list[str]:
        """Warnings by task: answers whose thinking never ended, or that think although thinking is off."""
        if self.settings.read_thoughts:
            return []
        generated = [record for record in records if record["finish"] is not None]
        end = self.end_of_thinking
        if self.settings.thinking:
            affected = [record for record in generated if not record["thinking_ended"]]
            warning = "never ended their thinking and count as empty; a larger --max-new-tokens gives them room"
        else:
            affected = [r for r in generated if end and end in self.tokenizer.decode(r["output_ids"])]
            warning = (
                f"hold {end}: the model thinks all the same, and its thoughts are scored; --set chat.thinking=true"
            )
        totals = _count(generated)
        return [f"{task}: {count} of {totals[task]} answers {warning}" for task, count in _count(affected).items()]


def open_chat(settings: ChatSpec | None, tokenizer: Tokenizer, model: str) -> Chat | None:
    """The chat settings of a run; None for plain prompts.

    Raises ConfigError if the tokenizer has no such template, or thinking is on and its end is unknown.
    """
    if settings is None:
        return None
    # 1) the template
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
    # 2) the end of thinking
    end = settings.end_of_thinking or think_end(tokenizer)
    if settings.thinking and end is None and not settings.read_thoughts:
        raise ConfigError(
            f"chat.thinking=true: {model} has no token known to end thinking ({', '.join(THINK_ENDS)}); "
            "name the text that does: --set chat.end_of_thinking=TEXT"
        )
    return Chat(tokenizer, settings, template, end)


def _count(records: Iterable[Record]) -> Counter[str]:
    return Counter(record["task"] for record in records)
