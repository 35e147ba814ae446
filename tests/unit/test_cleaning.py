"""What is changed in a text, and what is left alone: markup, invisible characters, personal data."""

from __future__ import annotations

import time

import pytest
from example_prose import PROSE, judged, masked

from kun_ray import cleaning

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


@pytest.mark.parametrize(
    "attack", ["<!--", "<script", "<div ", "[url=", "[[", "&#", "<" * 5 + "a ", "a@", "1 ", "1-", "{a:", "$("]
)
def test_hostile_text_takes_linear_time(attack: str) -> None:
    text = attack * (60_000 // len(attack))
    start = time.process_time()
    judged(text, max_tokens=None)
    cleaning.find_personal(text)
    assert time.process_time() - start < 2


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
