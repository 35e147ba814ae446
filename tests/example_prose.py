"""Good Chinese prose, and what the filters make of it and of what a test adds to it."""

from __future__ import annotations

from kun_ray.filters import FilterConfig, Filtered, apply_filters, build_filters

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
