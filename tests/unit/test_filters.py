"""Every filter both ways: it drops what it should, and leaves a good neighbour alone."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from kun_ray import cleaning
from kun_ray.config import ConfigError
from kun_ray.filters import FilterConfig, Filtered, apply_filters, build_filters, filter_texts

PROSE = (
    "新买的铸铁锅不要急着炒菜，先开锅，以后才不容易生锈和粘锅。第一步，用热水和软布把锅里外洗一遍，去掉出厂时留下的蜡，然后擦干。"
    "第二步，小火把锅烘到完全没有水汽，关火稍晾。第三步，取一块肥猪肉，用筷子夹着在锅内慢慢擦，让油脂均匀渗进锅面。"
)
TRADITIONAL = "這是一個關於電腦網路的說明，臺灣的資訊產業從上個世紀開始發展，鐵路與銀行也很早就使用電腦處理業務，後來逐漸普及到一般家庭。"


def judged(text: str, **settings: object) -> Filtered:
    config = FilterConfig(**settings)  # type: ignore[arg-type]
    return apply_filters(text, build_filters(config), config)


def masked(text: str) -> str:
    return judged(PROSE + text).text.removeprefix(PROSE)


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


# Cleaning


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("零\u200b宽\ufeff字\u202e符", "零宽字符"),
        ("控\x00制\x07字\x1b[31m符\x1b[0m", "控制字符"),
        ("一\r\n二\r三\u2028四", "一\n二\n三\n四"),
        ("　　段首\xa0 空格  \n\n\n\n下一段\t尾 ", "段首 空格\n\n下一段 尾"),
        ("全角，标点！（保留）ＡＢＣ", "全角，标点！（保留）ＡＢＣ"),
        ("e\u0301", "é"),
        ("坏\ud800的", "坏\ufffd的"),
        ("👨‍👩‍👧 家\u200d人", "👨‍👩‍👧 家人"),
    ],
)
def test_clean(raw: str, clean: str) -> None:
    assert cleaning.clean(raw) == clean


@pytest.mark.parametrize(
    ("raw", "stripped"),
    [
        ("<p class='a'>一段</p><div>二段<br/>三段</div>", "一段\n\n二段\n三段"),
        ("甲<script>var a = '<p>';</script>乙<style>p{color:red}</style>丙<!-- 注 -->丁", "甲乙丙丁"),
        ("文字&nbsp;&lt;b&gt;&amp;nbsp;&#20013;&#x6587;", "文字 <b> 中文"),
        ("[url=http://a.cn]链接[/url][b]粗[/b]", "链接粗"),
        ("[[目标|名称]]和[[名称]]", "名称和名称"),
        ("a < b 且 c > d，List<String>，#include <stdio.h>", "a < b 且 c > d，List<String>，#include <stdio.h>"),
        ("http://x.cn/?a=1&copy=2&lt=3", "http://x.cn/?a=1&copy=2&lt=3"),
        ("数组 a[i] 与 b[s]", "数组 a[i] 与 b[s]"),
        ("注释以 <!-- 开头", "注释以 <!-- 开头"),
    ],
)
def test_strip_markup(raw: str, stripped: str) -> None:
    assert cleaning.clean(cleaning.strip_markup(raw)) == stripped


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


@pytest.mark.parametrize(
    "attack", ["<!--", "<script", "<div ", "[url=", "[[", "&#", "<" * 5 + "a ", "a@", "1 ", "1-", "{a:", "$("]
)
def test_hostile_text_takes_linear_time(attack: str) -> None:
    text = attack * (60_000 // len(attack))
    start = time.process_time()
    judged(text, max_tokens=None)
    cleaning.find_personal(text)
    assert time.process_time() - start < 2


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


# Personal data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("电话13812345678。", "电话〔电话〕。"),
        ("手机：138-1234-5678，或 +86 139 1234 5678", "手机：〔电话〕，或 〔电话〕"),
        ("手机１３８１２３４５６７８", "手机〔电话〕"),
        ("手机138\u200b1234\u200b5678", "手机〔电话〕"),
        ("身份证11010519491231002X，", "身份证〔身份证号〕，"),
        ("身份证１１０１０５１９４９１２３１００２ｘ，", "身份证〔身份证号〕，"),
        ("邮箱 zhang.san@mail.example.com 或li_4@qq.com。", "邮箱 〔邮箱〕 或〔邮箱〕。"),
        ("邮箱13812345678@qq.com", "邮箱〔邮箱〕"),
        ("邮箱ｌｉ＠ｑｑ．ｃｏｍ", "邮箱〔邮箱〕"),
        ("卡号6222021234567890128", "卡号〔银行卡号〕"),
        ("卡号 4111 1111 1111 1111 完", "卡号 4111 1111 1111 1111 完"),  # too few different digits: a test number
        ("卡号 5500 0055 5555 5559 与 4539-1488-0343-6467", "卡号 5500 0055 5555 5559 与 〔银行卡号〕"),
        ("来自 218.30.103.45 的访问", "来自 〔IP〕 的访问"),
        ("来自IP:218.30.103.45,", "来自IP:〔IP〕,"),
    ],
)
def test_personal_data_is_masked(text: str, expected: str) -> None:
    assert masked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "订单号110105194912310021，",  # 18 digits, wrong check digit
        "订单号110105194913310029",  # month 13
        "订单号 201305121381234567890123",
        "金额13800000000元，市值 139 0000 0000 元",
        "圆周率是3.14159265358979，还有 0.13812345678",
        "2013 2014 2015 2016 年，1998-2003 年，189 2010 2011",
        "时间戳 1381234567890，条码 6901234567892",
        "流水号 6222021234567890123",  # fails Luhn
        "软件版本 10.12.133.45，v218.30.103.45，第 218.30.103.45 版",
        "路由器地址是 192.168.1.1，本机是 127.0.0.1，掩码 255.255.255.0",
        "第 1.2.3.4 节，以及 300.1.2.3 和 1.2.3.4.5",
        "微博 @张三 与 @lisi，pip install ray@2.60，价格 3.5@kg",
        "110 报警，客服 10086，热线 400-123-4567",
    ],
)
def test_other_numbers_are_left_alone(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize(
    ("nobodys", "next_to_it"),
    [
        ("10.255.255.254", "11.10.255.254"),
        ("172.16.0.1", "172.15.255.254"),
        ("172.31.255.254", "172.32.0.1"),
        ("192.168.255.1", "192.169.0.1"),
        ("127.10.0.1", "128.10.0.1"),
        ("169.254.169.254", "169.253.169.254"),
        ("100.64.10.1", "100.63.255.254"),
        ("192.0.2.11", "192.0.3.11"),
        ("198.51.100.23", "198.51.101.23"),
        ("203.0.113.77", "203.0.114.77"),
        ("198.19.255.254", "198.20.0.1"),
        ("224.0.0.251", "223.255.255.251"),
        ("239.255.255.250", "114.114.114.114"),
    ],
)
def test_addresses_that_are_nobodys_stay_and_their_neighbours_do_not(nobodys: str, next_to_it: str) -> None:
    """Ranges of the IANA registry of special purposes, and multicast."""
    assert masked(f"访问 {nobodys} 即可") == f"访问 {nobodys} 即可"
    assert masked(f"访问 {next_to_it} 即可") == "访问 〔IP〕 即可"


def test_masks_are_counted() -> None:
    result = judged(PROSE + "电话13812345678、13912345678，邮箱 a@b.com")
    assert result.measures == {"masked_phone": 2, "masked_email": 1}


def test_personal_data_can_reject_or_stay_by_kind() -> None:
    text = PROSE + "电话13812345678，来自 218.30.103.45，身份证11010519491231002X"
    assert judged(PROSE + "电话13812345678", pii="reject").reason == "pii_phone"
    assert judged(text, pii="keep").text == text
    assert judged(text, pii_kinds={"id_card": "reject"}).reason == "pii_id_card"
    assert judged(text, pii_kinds={"ip": "keep"}).text == PROSE + "电话〔电话〕，来自 218.30.103.45，身份证〔身份证号〕"


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
