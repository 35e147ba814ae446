"""Prompt text → token ids, so that a row's text can never act as a control token. Training and inference both render here.

A template is rendered once through the model's chat template with markers where the row's text will stand, cut at the
markers, and its fixed pieces tokenised with control tokens recognised. Text from a row is tokenised with control tokens
split: `<|im_end|>` on a web page stays eight harmless tokens. The fixed prefix is shared by all rows, so prefix caching
works.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

from kun_ray.config import ConfigError, require
from kun_ray.models import read_chat_template

if TYPE_CHECKING:  # transformers takes seconds to import, and most processes never need it
    from transformers import PreTrainedTokenizerFast

FIELDS = ("text", "instruction", "title", "answer")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The layout of Yi-Chat and many others: what `chat_template: chatml` stands for."""

_MARK = re.compile(f"⟦({'|'.join(FIELDS)})⟧")
_CHAT_MARK = re.compile(rf"⟦({'|'.join(FIELDS)}|user\d+|reply\d+)⟧")
_WRITTEN_CONTROL = re.compile(r"\[/?[A-Z_]{2,20}\]|<</?[A-Z_]{2,20}>>")
_MARKUP = re.compile(r"[^\w\s]")
_TEMPLATE_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>")


@dataclasses.dataclass
class PromptConfig:
    """One step's prompt."""

    user: str = MISSING
    """The user's turn; {text}, {instruction}, {title} and {answer} stand for the row's own."""
    system: str | None = None
    """The system's turn; null leaves it out."""

    def __post_init__(self) -> None:
        for name in self.fields():
            require(name in FIELDS, f"a prompt names {{{name}}}; it may use {', '.join('{' + f + '}' for f in FIELDS)}")

    def fields(self) -> set[str]:
        """The placeholders in both turns. Raises ConfigError on unbalanced braces."""
        return {name for turn in (self.user, self.system or "") for name in _placeholders(turn)}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt ready to be filled: pieces of fixed token ids (list) and names of row fields (str), in order."""

    pieces: tuple[tuple[int, ...] | str, ...]
    tokenizer: PreTrainedTokenizerFast

    def render(self, row: dict[str, Any]) -> list[int]:
        """The token ids of this prompt for one row. Shape: [prompt length]. Raises KeyError on a missing field."""
        ids: list[int] = []
        for piece in self.pieces:
            ids.extend(encode_text(self.tokenizer, row[piece] or "") if isinstance(piece, str) else piece)
        return ids

    def num_fixed_tokens(self) -> int:
        """Tokens of the prompt before any row's text is put in."""
        return sum(len(piece) for piece in self.pieces if not isinstance(piece, str))

    def extended(self, ids: list[int]) -> Prompt:
        """This prompt with the beginning of the reply put into its end."""
        return dataclasses.replace(self, pieces=(*self.pieces, tuple(ids)))


def load_tokenizer(
    path: str, chat_template: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerFast:
    """A model's tokenizer, with its chat template or the one given.

    Args:
        path: folder or hub id of the model.
        chat_template: null (the model's own), `chatml`, the path of a Jinja file, or its content.
    Raises:
        ConfigError: no tokenizer there, not a fast one, no chat template to be had, or control tokens that text can form.
    """
    try:
        tokenizer = _tokenizer_class(path).from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and hub errors for the same mistake
        raise ConfigError(
            f"no tokenizer can be loaded from {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{path} has only a slow (Python) tokenizer: save it once as tokenizer.json and point to that folder"
        )
    tokenizer.backend_tokenizer.no_truncation()  # some tokenizer.json files bring a length limit, which would cut prompts
    tokenizer.backend_tokenizer.no_padding()
    if chat_template is not None:
        tokenizer.chat_template = CHATML if chat_template == "chatml" else read_chat_template(chat_template)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{path} has no chat template: set chat_template: chatml, or the path of the Jinja file it was trained with"
        )
    # Base models such as Yi's have <|im_end|> in their vocabulary without saying that it is a control token.
    vocabulary, known = tokenizer.get_vocab(), {token.content for token in tokenizer.added_tokens_decoder.values()}
    written = set(_TEMPLATE_CONTROL.findall(str(tokenizer.chat_template)))
    unsaid = sorted(name for name in written if name in vocabulary and name not in known)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in unsaid], special_tokens=True)
    control = _control_tokens(tokenizer).items()
    unsafe = [name for name, i in control if i in encode_text(tokenizer, name) and name != tokenizer.unk_token]
    if unsafe:  # Unigram models find any vocabulary entry in text, control tokens too
        raise ConfigError(
            f"{path}: a web page that holds {', '.join(unsafe[:3])} would be read as control tokens; take a model with a BPE tokenizer"
        )
    return tokenizer  # type: ignore[no-any-return]


def build_prompt(tokenizer: PreTrainedTokenizerFast, config: PromptConfig, reply_prefix: str = "") -> Prompt:
    """Renders a prompt's fixed part once.

    Args:
        tokenizer: from `load_tokenizer`.
        config: the turns, with placeholders.
        reply_prefix: fixed text that the reply begins with (as ordinary text).
    Raises:
        ConfigError: the chat template is broken or refuses these turns.
    """
    messages = [{"role": "user", "content": _marked(config.user)}]
    if config.system:
        messages.insert(0, {"role": "system", "content": _marked(config.system)})
    rendered = _render(tokenizer, messages, add_generation_prompt=True)
    parts = enumerate(_MARK.split(rendered))
    pieces = (part if index % 2 else tuple(_encode_template(tokenizer, part)) for index, part in parts if part)
    prompt = Prompt(tuple(pieces), tokenizer)
    return prompt.extended(encode_text(tokenizer, reply_prefix)) if reply_prefix else prompt


@dataclasses.dataclass(frozen=True)
class Chat:
    """A whole conversation ready to be filled, for training: like Prompt, with the assistant's turns in it."""

    pieces: tuple[tuple[int, ...] | str, ...]
    stop: tuple[int, ...]
    tokenizer: PreTrainedTokenizerFast

    def render(self, values: dict[str, str]) -> tuple[list[int], list[bool]]:
        """Token ids of the conversation, and which of them the assistant says (its replies and the token that ends one).

        Args:
            values: text of every row field in the first user's turn, of `user1`, `user2`, … and of `reply0`, `reply1`, …
        """
        ids: list[int] = []
        said: list[bool] = []
        after_reply = False
        for piece in self.pieces:
            new = encode_text(self.tokenizer, values[piece] or "") if isinstance(piece, str) else list(piece)
            is_reply = isinstance(piece, str) and piece.startswith("reply")
            stops = len(self.stop) if after_reply and tuple(new[: len(self.stop)]) == self.stop else 0
            ids += new
            said += [is_reply or at < stops for at in range(len(new))]
            after_reply = is_reply
        return ids, said


def build_chat(tokenizer: PreTrainedTokenizerFast, config: PromptConfig, num_turns: int = 1) -> Chat:
    """A conversation of `num_turns` questions and replies; its first question is rendered as `build_prompt` does.

    Raises:
        ConfigError: as `build_prompt`; the chat template does not end a reply with text of its own; or its text before a
            reply is not what it shows to a model that is about to reply, so that training would not match inference.
    """
    turns: list[dict[str, str]] = [{"role": "system", "content": _marked(config.system)}] if config.system else []
    for turn in range(num_turns):
        turns.append({"role": "user", "content": f"⟦user{turn}⟧" if turn else _marked(config.user)})
        turns.append({"role": "assistant", "content": f"⟦reply{turn}⟧"})
    rendered = _render(tokenizer, turns, add_generation_prompt=False)
    asked = _render(tokenizer, turns[: 2 if config.system else 1], add_generation_prompt=True)
    if rendered.partition("⟦reply0⟧")[0].rstrip() != asked.rstrip():
        raise ConfigError(
            "the chat template shows a conversation otherwise than it asks for a reply: a model trained on the one would "
            "not know the other; give chat_template: chatml, or a template with one layout"
        )
    rendered = asked + "⟦reply0⟧" + rendered.partition("⟦reply0⟧")[2]  # to the blank as in inference
    pieces: list[tuple[int, ...] | str] = []
    for index, part in enumerate(_CHAT_MARK.split(rendered)):
        if index % 2:
            pieces.append(part)
        elif part:
            pieces.append(tuple(_encode_template(tokenizer, part)))
    end, stop = turn_end(tokenizer), stop_token_ids(tokenizer)
    if not stop:
        raise ConfigError(
            f"the chat template ends a reply by {len(end)} ordinary tokens of this model and no control token: a model trained "
            "with it would never stop. Take a template whose marks are control tokens of the model's tokenizer"
        )
    return Chat(tuple(pieces), tuple(end[: end.index(stop[0]) + 1]), tokenizer)


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Token ids of text that came from a row: control tokens in it are split into ordinary ones."""
    # the batch call is the one that does not work out where in the text each token stands, a third of the time
    return list(_text_encoder(tokenizer).encode_batch_fast([text], add_special_tokens=False)[0].ids)


def count_tokens(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    """Number of the model's own tokens in each text. Shape: [len(texts)]."""
    return [len(encoding) for encoding in _text_encoder(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def turn_end(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids that close the assistant's turn in the chat template: where a reply ends, in training and inference."""
    turns = [{"role": "user", "content": "⟦text⟧"}, {"role": "assistant", "content": "⟦answer⟧"}]
    rendered = _render(tokenizer, turns, add_generation_prompt=False)
    return _encode_template(tokenizer, rendered.rpartition("⟦answer⟧")[2])


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The control token that ends a reply, for models whose generation config does not name it. Shape: [0 or 1]."""
    end = turn_end(tokenizer)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return [token for token in end if token in special][:1]


def _tokenizer_class(path: str) -> Any:
    """AutoTokenizer; or the class that it would take for a folder with a plain tokenizer.json, without importing torch."""
    config = Path(path, "tokenizer_config.json")
    whole = config.is_file() and Path(path, "tokenizer.json").is_file()
    if whole and json.loads(config.read_text()).get("tokenizer_class") in (
        "TokenizersBackend",
        "PreTrainedTokenizerFast",
    ):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


@functools.lru_cache(maxsize=8)
def _text_encoder(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer that takes control tokens for text. A copy, because the switch is shared state, and because
    only special tokens are split: DeepSeek's <｜User｜> and Qwen's <think> are added tokens that are not special."""
    encoder: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
    encoder.add_special_tokens(list(_control_tokens(tokenizer)))
    encoder.encode_special_tokens = True
    # Llama-2's [INST] and <<SYS>> are ordinary text even in its template: letter by letter they have other ids than there.
    written = sorted(set(_WRITTEN_CONTROL.findall(str(tokenizer.chat_template or ""))))
    cuts = [(re.escape(w[:i]), re.escape(w[i]), re.escape(w[i + 1 :])) for w in written for i in range(1, len(w) - 1)]
    if cuts:
        split = pre_tokenizers.Split(Regex("|".join(f"(?<={a}){b}(?={c})" for a, b, c in cuts)), "isolated")
        own = encoder.pre_tokenizer
        encoder.pre_tokenizer = pre_tokenizers.Sequence([split, own]) if own is not None else split
    return encoder


def _control_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Special tokens and added ones that look like markup; added words and runs of blanks are vocabulary, not control."""
    added = [(token, i) for i, token in tokenizer.added_tokens_decoder.items()]
    return {t.content: i for t, i in added if t.special or (len(t.content) > 1 and _MARKUP.search(t.content))}


def _render(tokenizer: PreTrainedTokenizerFast, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        roles = " + ".join(turn["role"] for turn in turns)
        raise ConfigError(f"the chat template does not take the turns {roles}: {error}") from None


def _encode_template(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def _placeholders(turn: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(turn))
    except ValueError as error:
        raise ConfigError(f"a prompt has unbalanced braces ({error}): write {{{{ and }}}} for literal ones") from None
    for _, name, form, conversion in parsed:
        require(
            not form and not conversion,
            f"a prompt names {{{name}…}} with a format: write {{{name}}} alone, or {{{{ and }}}} for literal braces",
        )
    return [name for _, name, _, _ in parsed if name is not None]


def _marked(turn: str) -> str:
    return turn.format(**{name: f"⟦{name}⟧" for name in FIELDS})
