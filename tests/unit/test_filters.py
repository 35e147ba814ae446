"""Every filter both ways: it drops what it should, and leaves a good neighbour alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_prose import PROSE, TRADITIONAL, judged

from kun_ray.config import ConfigError
from kun_ray.filters import FilterConfig, Filtered, apply_filters, build_filters, filter_texts


@pytest.mark.parametrize(
    "text", [PROSE, TRADITIONAL, PROSE + TRADITIONAL, "今天天气很好，我们一起去公园里散步，看看花草树木吧。"]
)
def test_good_prose_passes_unchanged(text: str) -> None:
    assert judged(text) == Filtered(text, None, {})


def test_demo_corpus_passes() -> None:
    path = Path(__file__).parents[2] / "kun_ray/demo/wanjuan.jsonl"
    texts = [
        json.loads(line)["content"]
        for line in path.read_text(encoding="utf-8").splitlines()
        if '"content"' in line[:60]
    ]
    assert texts
    assert {judged(text).reason for text in texts} == {None}


# Length and tokens


def test_length_limits_in_characters() -> None:
    assert judged("太短了。").reason == "too_short"
    assert judged("字" * 5 + PROSE[:15]).reason is None
    assert judged(PROSE, max_chars=100).reason == "too_long"
    assert judged(PROSE, max_chars=len(PROSE)).reason is None
    assert judged("好" * 2_000_000, max_chars=100).reason == "too_long"


def test_blanks_and_markup_do_not_count_as_length() -> None:
    assert judged("<p>" + "　" * 50 + "太短了。</p>").reason == "too_short"


def test_tokens_are_counted_in_one_batch_for_survivors_only() -> None:
    calls: list[list[str]] = []

    def count(texts: list[str]) -> list[int]:
        calls.append(texts)
        return [len(text) for text in texts]

    config = FilterConfig(max_tokens=150)
    texts = [PROSE, "短", PROSE + TRADITIONAL, "English only, and long enough to pass."]
    results = filter_texts(texts, build_filters(config), config, count)
    assert [result.reason for result in results] == [None, "too_short", "too_long", "not_chinese"]
    assert [result.measures.get("tokens") for result in results] == [len(texts[0]), None, len(texts[2]), None]
    assert calls == [[texts[0], texts[2]]]


# Markup


def test_markup_settings() -> None:
    page = f"<div>{PROSE}</div>"
    assert judged(page).text == PROSE
    assert judged(page, markup="reject").reason == "markup"
    assert judged(PROSE + "其中 a < b，且 List<String> 可用。", markup="reject").reason is None
    assert judged(page, markup="keep") == Filtered(page, None, {})


def test_markup_left_over() -> None:
    template = "{{信息框|名称=某地}}[[分类]]<custom:tag id='1' style='width:100%;height:20px'>.a{margin:0;} document.write function(a){ "
    assert judged(PROSE[:80] + template * 2).reason == "markup"
    assert judged(PROSE + "请在终端输入 mkdir <目录名>，再用 [[ -f 文件 ]] 判断它是否存在。").reason is None


# Language and broken text


@pytest.mark.parametrize(
    "text",
    [
        "This is an English page about cast iron pans, with two 汉字 in it and nothing else of interest.",
        "これは鋳鉄鍋の使い方を説明する日本語の文章です。最初に鍋を洗って、乾燥させてから油を塗ってください。",
        "東京都知事選挙管理委員会は本日、投票所の一覧を発表しました。有権者の皆様は投票所入場券をご持参ください。",
        "무쇠솥을 처음 사용할 때는 먼저 깨끗이 씻어서 말린 다음 기름을 발라야 합니다. 韓國語 文章입니다.",
        "2021 3.5 1200 88% 2022 4.1 1300 90% 2023 4.6 1400 92% 2024 5.0 1500 95%",
    ],
)
def test_other_languages_are_not_chinese(text: str) -> None:
    assert judged(text).reason == "not_chinese"


@pytest.mark.parametrize(
    "text",
    [
        TRADITIONAL,
        "在 Linux 系统中安装 CUDA Toolkit 之前，请先用 nvidia-smi 命令确认显卡驱动的版本，再下载对应的安装包。",
        "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？",
        "设角α与角β互余，则 sinα=cosβ，这个结论可以由直角三角形的定义直接得到，请读者自己证明。",
        "日语里的「の」相当于汉语的“的”，例如「私の本」就是“我的书”，初学者很容易掌握这个用法，也常常在招牌上见到它。",
    ],
)
def test_chinese_with_foreign_words_stays(text: str) -> None:
    assert judged(text).reason is None


def test_language_is_asked_offline_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    japanese = (
        "東京都知事選挙管理委員会は本日、投票所の一覧を発表しました。有権者の皆様は投票所入場券をご持参ください。"
    )
    monkeypatch.setattr("socket.socket", None)
    assert judged(japanese).reason == "not_chinese"
    assert judged(japanese, language=False).reason is None


@pytest.mark.parametrize(
    "text",
    [
        PROSE.encode().decode("gbk", "replace"),
        PROSE.encode().decode("cp1252", "replace"),
        PROSE.encode().decode("latin-1"),
        PROSE[:60] + "锟斤拷" * 5,
        PROSE[:60] + "\ue000\ue001\ue002\ufffd" * 3,
        PROSE[:40] + "■□◆◇★☆→←" * 5,
    ],
)
def test_garbled(text: str) -> None:
    assert judged(text).reason == "garbled"


@pytest.mark.parametrize(
    "text",
    [
        TRADITIONAL,
        PROSE + "乱码里常见“锟斤拷”三个字。",
        PROSE + "气温 25℃，价格 ￥99～￥120，误差 ±3%，好评率≥98%。☆☆☆",
        "涓涓细流汇成江河，锛凿斧锯都是木匠的工具，这些字虽然少见，却都是正常的汉字，不是乱码。",
        PROSE + "咖啡馆叫 Café Déjà Vu，老板姓 Müller。",
    ],
)
def test_not_garbled(text: str) -> None:
    assert judged(text).reason is None


# Repetition and boilerplate


@pytest.mark.parametrize(
    "text",
    [
        PROSE[:60] + "\n" + "\n".join(["点这里看大图哦亲", "好东西大家一起分享"] * 5),
        PROSE[:50] * 4,
        PROSE + "哈" * 12,
        PROSE + "真的好吃" * 10,
        PROSE + "买二送一，全场包邮，先到先得！" * 9,
    ],
)
def test_repetition(text: str) -> None:
    assert judged(text).reason == "repetition"


@pytest.mark.parametrize(
    "text",
    [
        PROSE + "哈哈哈哈，太好了太好了太好了！",
        PROSE + "————————————————————",
        PROSE + "圆周率精确到 1000000000000 位，编号 XXXXXXXXXXXXXXXX。",
        "轻轻的我走了，正如我轻轻的来；我轻轻的招手，作别西天的云彩。\n悄悄的我走了，正如我悄悄的来；我挥一挥衣袖，不带走一片云彩。",
        PROSE + "\n答：可以。\n" + TRADITIONAL + "\n答：可以。",
    ],
)
def test_no_repetition(text: str) -> None:
    assert judged(text).reason is None


@pytest.mark.parametrize(
    "text",
    [
        "首页 | 关于我们 | 联系我们 | 网站地图 | 友情链接\n"
        + PROSE[:60]
        + "\n版权所有 某某公司 京ICP备12345678号\n上一篇：没有了 下一篇：没有了",
        PROSE[:50] + "免责声明 隐私政策 用户协议 意见反馈 设为首页 加入收藏 返回顶部 分享到 我要评论 相关阅读 热门推荐",
    ],
)
def test_boilerplate(text: str) -> None:
    assert judged(text).reason == "boilerplate"


def test_prose_that_mentions_boilerplate_stays() -> None:
    assert judged(PROSE + "如果还有问题，可以在网站底部的意见反馈里留言，我们会尽快回复。").reason is None
    assert judged(PROSE + "\n责任编辑：小王").reason is None


# Perplexity

ARPA = """\\data\\
ngram 1=6
ngram 2=3

\\1-grams:
-2.0\t<unk>\t0
0\t<s>\t-0.3
-1.0\t</s>\t0
-1.0\t铁\t-0.3
-1.0\t锅\t-0.3
-1.0\t铁锅\t-0.3

\\2-grams:
-0.1\t<s> 铁
-0.1\t铁 锅
-0.1\t锅 </s>

\\end\\
"""


def test_perplexity_is_measured_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "model.arpa"
    path.write_text(ARPA, encoding="utf-8")
    settings: dict[str, object] = {"kenlm_path": str(path), "kenlm_units": "characters", "min_chars": 0}
    known = judged("铁锅\n铁 锅", **settings).measures["perplexity"]
    assert known == pytest.approx(10 ** (0.3 / 3), rel=1e-3)
    assert judged(PROSE, **settings).measures["perplexity"] > 50
    assert judged(PROSE, max_perplexity=50.0, **settings).reason == "perplexity"
    assert judged("铁锅", max_perplexity=50.0, **settings).reason is None
    assert judged("铁锅", min_perplexity=2.0, **settings).reason == "perplexity"
    assert judged("铁锅", kenlm_path=str(path), min_chars=0).measures["perplexity"] == pytest.approx(
        10 ** (2.6 / 2), rel=1e-3
    )


# Configuration and order


def test_first_reason_wins_from_cheap_to_dear() -> None:
    assert judged("short").reason == "too_short"
    assert judged("English " * 20).reason == "not_chinese"
    assert judged(PROSE + "哈" * 12 + "13812345678", pii="reject").reason == "repetition"


@pytest.mark.parametrize(
    "settings",
    [
        {"markup": "drop"},
        {"pii": "hide"},
        {"pii_kinds": {"telephone": "mask"}},
        {"pii_kinds": {"phone": "hide"}},
        {"min_chars": -1},
        {"max_tokens": 0},
        {"min_chars": 3000},
        {"max_ngram_repetition": 1.5},
        {"max_perplexity": 100.0},
        {"kenlm_path": "x", "min_perplexity": 9.0, "max_perplexity": 1.0},
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        FilterConfig(**settings)  # type: ignore[arg-type]


def test_limits_can_be_switched_off() -> None:
    off = FilterConfig(
        min_chars=0, max_tokens=None, min_chinese_share=0.0, language=False, max_symbol_share=None, max_garbled_share=None,
        max_markup_share=None, max_boilerplate_share=None, max_line_repetition=None, max_ngram_repetition=None,
        max_unit_repeats=None, pii="keep", markup="keep",
    )  # fmt: skip
    for text in ("", "a", "■" * 50, "哈" * 5000, "首页 版权所有", "<p>x</p>"):
        assert apply_filters(text, build_filters(off), off).reason is None
