"""Quantities in short texts: a number with sign, currency, scale, percent and unit, which is read whole or not at all.

What does not follow this grammar to its last character is no quantity, whatever it may be: there is no list of what must not
stand beside a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from itertools import product

__all__ = [
    "CHANGING",
    "DENYING",
    "NAME",
    "NUMBER",
    "TAIL",
    "Quantity",
    "decimal",
    "plain_word",
    "quantity",
    "same_quantity",
    "unit_of",
    "word_set",
]

LONGEST = 1000  # characters of a text that is read; a longer one is no quantity
DIGITS = 400  # of what fractions are computed of; longer numbers are compared as they stand

Unit = tuple[tuple[str, int], ...]
"""Names of units, or a noun, each with its power; () for none."""


@dataclass(frozen=True)
class Quantity:
    value: Decimal | Fraction
    percent: bool = False
    unit: Unit = ()
    glued: bool = False
    """Is the unit one letter right behind the number, so that it may be a variable?"""
    name: str = ""
    """Of what it is said to be, such as x."""


# -- words


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that deny, bound or compute: with one of these in front, what follows is not what is said to be right.
DENYING = word_set(
    """
    not no never none neither nor nobody nothing cannot hardly unlikely wrong incorrect false opposite except without
    unless minus negative plus times than least most or and either between twice half double over under above below
    about almost approximately approx around nearly roughly versus from by sqrt log ln sin cos tan exp mod divided
    multiplied possibly perhaps maybe probably unlike
    """
)
# These too change a number, or are no nouns: never part of a noun phrase.
CHANGING = DENYING | word_set(
    """
    a an any as at across after alternatively although before behind beneath beside besides beyond both but can could
    despite during each else equal equals every few fewer for greater higher how however if in instead into is its less
    lesser like lower many may might more near now of off often on once only onto other others otherwise out past per
    rather same several since so some sometimes still such that the their then there therefore this though through till
    to together too towards until up upon upwards downwards backwards forwards via was way were what when where
    whether which while who with within would right correct true yes always minimum maximum min max ago away early late
    ahead short wait actually sorry modulo modulus remainder factorial factorials choose power powers exponent squared
    cubed square cubic cube root roots logs lim sum product negatives positive inverse inverses reciprocal reciprocals
    absolute doubles doubled triple triples tripled quadruple halves halved quarter quarters third thirds fifth fifths
    sixth sixths eighth eighths ninth ninths percentage percentages percentile percentiles permille percent pct bps
    ratio fold folds one ones two twos three four five six seven eight nine ten tens eleven twelve twenty thirty forty
    fifty sixty seventy eighty ninety zero first second last next previous dozen dozens pair pairs couple couples score
    scores gross grosses hundred hundreds thousand thousands million millions billion billions trillion trillions
    quadrillion quadrillions zillion zillions myriad myriads lakh lakhs lac lacs crore crores grand grands mil mill
    mille mio mln mld mrd bil bln kilo kilos mega megas giga gigas tera milli micro nano pico centi deci deca hecto
    tausend hundert millionen milliarde milliarden milliard milliards milliers millones millares cientos centenas
    centaines decenas dezenas docenas douzaine douzaines dutzend mila millon milhoes binary octal ternary hex
    hexadecimal decimal decimals base bases radix roman mils fours fives sixes sevens eights nines elevens twelves
    twenties thirties forties fifties sixties seventies eighties nineties zeros zeroes basis tenth tenths halfs teens
    repeating recurring periodic bar overline rounded
    """
)
_IRREGULAR = word_set("people children men women teeth mice geese fish sheep deer dice pence policemen firemen")
_THS = word_set("months paths births deaths baths moths myths youths booths growths cloths lengths widths depths")
# What may follow a quantity and says nothing more.
TAIL = re.compile(
    r",? (?:in (?:all|total)|left|remaining|total|altogether|overall|long|wide|tall|high|deep|old|"
    r"is (?:the|my|our) (?:final |correct |right )?answer)$"
)


def plain_word(word: str) -> bool:
    """May it be part of a noun phrase?"""
    return len(word) > 2 and word.isascii() and word.isalpha() and word.casefold() not in CHANGING


def _is_plural(word: str) -> bool:
    word = word.casefold()
    if word in _IRREGULAR:
        return True
    return word.endswith("s") and not word.endswith(("ss", "us", "is")) and (not word.endswith("ths") or word in _THS)


def _noun(text: str, one: bool) -> str | None:
    """A noun phrase in the plural, or of one thing: red apples, cups of green tea."""
    words, _, behind = text.partition(" of ")
    whole, of = words.split(" "), behind.split()
    plain = [word for at, word in enumerate(whole) if word != "positive" or at + 1 == len(whole)] + of
    if len(whole) > 3 or len(of) > 2 or not all(map(plain_word, plain)) or not (one or _is_plural(whole[-1])):
        return None
    return " ".join(map(_singular, whole + of))


def _singular(word: str) -> str:
    word = word.casefold()
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("sses", "ss")):
        if word.endswith(ending):
            return word.removesuffix(ending) + instead
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


# -- units

_PREFIXES = dict(zip("nµmcdkMGT", ("nano", "micro", "milli", "centi", "deci", "kilo", "mega", "giga", "tera"), strict=True))
_BASES = {"m": "meter metre", "g": "gram gramme", "s": "second", "l": "liter litre", "W": "watt", "J": "joule", "V": "volt"}
_BASES |= {"A": "ampere amp", "N": "newton", "Hz": "hertz", "Pa": "pascal", "B": "byte", "b": "bit", "eV": "electronvolt"}
_BASES |= {"cal": "calorie", "Wh": "watthour", "mol": "mole", "Ω": "ohm"}
_OTHERS = """
    in: inch inches; ft: foot feet; yd: yard yds; mi: mile; oz: ounce; lb: pound lbs; t: tonne; ton: ton; gal: gallon;
    qt: quart; min: minute mins; h: hour hr hrs; day: day; week: week wk wks; month: month; year: year yr yrs; °: degree deg;
    rad: radian; $: dollar USD usd; ¢: cent; €: euro EUR eur; £: GBP gbp; ¥: yen JPY; ₹: rupee INR; acre: acre; ha: hectare;
    °C: ℃ celsius; °F: ℉ fahrenheit; K: kelvin; S: siemens; rpm: rpm; kn: knot; unit: unit; s: sec"""


def _units() -> dict[str, Unit]:
    """Each way to write a unit -> the unit."""
    found: dict[str, Unit] = {"mph": (("h", -1), ("mi", 1))}
    found |= dict.fromkeys(("kph", "kmh"), (("h", -1), ("km", 1)))
    for base, names in _BASES.items():
        for prefix, long in [("", ""), *_PREFIXES.items()]:
            if base in "Bb" and prefix in tuple("nµmcd"):
                continue
            unit: Unit = ((prefix + base, 1),)
            if base not in "Bb" or prefix:  # "5 B" may be billions, or a choice
                found[prefix + base] = unit
            for name in names.split():
                found[long + name] = found[long + name + "s"] = unit
    for symbol, names in (entry.split(":") for entry in _OTHERS.split(";")):
        unit = ((symbol.strip(), 1),)
        for name in names.split():
            found[name] = found[name + "s"] = unit
        if symbol.strip() not in ("K", "t"):  # thousands, and what may be a variable
            found[symbol.strip()] = unit
    for other in ("L", "mL", "cL", "dL"):
        found[other] = found[other.replace("L", "l")]
    for micro, base in product("uμ", _BASES):
        found[micro + base] = ((f"µ{base}", 1),)
    return found | {"KB": found["kB"], "hertz": found["Hz"], "cms": found["cm"], "kms": found["km"]}


UNITS = _units()
_FOLDED: dict[str, set[Unit]] = {}
for _way, _meant in UNITS.items():
    _FOLDED.setdefault(_way.casefold(), set()).add(_meant)
# Symbols that mean something else than what their small or large letters do: petaamperes, newton metres, molars.
_SYMBOLS = word_set("m g s A mol cd Hz N Pa J W C V F S Wb T H lm lx Bq Gy Sv kat L l M B b eV Wh")
_PRODUCTS = [a + b for a, b in product(word_set("N V A W J C T F S Pa Wb"), "mshA")]
_EVERY = ("", "da", *"yzafpnµumcdhkMGTPEZY")
SPECIAL = frozenset(map("".join, product(_EVERY, [*_SYMBOLS, *_PRODUCTS]))) | {"NM", "Gal", "Cal", "Rad"}

_FACTOR = re.compile(
    r"(?:(?P<how>square|sq|cubic|cu)\.? )?(?P<name>[^\W\d_]+(?: [^\W\d_]+){0,6}|°[CF]?|[$€£¥₹¢])\.?"
    r"(?:\^\{?(?P<power>-?[1-9])\}?|(?<=[ckmd]m)(?P<raised>[23]))?"
)
_SYMBOL = r"[a-zA-Zµμ°Ω]{1,4}"
_JUXTAPOSED = re.compile(rf"{_SYMBOL}(?:\^\{{?-?[1-9]\}}?)?(?: {_SYMBOL}(?:\^\{{?-?[1-9]\}}?)?){{1,3}}")  # m s^{-1}
_EACH = re.compile(
    r" an? (?=(?:second|minute|hour|day|night|week|month|year|person|piece|pound|kilogram|gallon|lit(?:er|re)|mile)$)"
)


def unit_of(text: str, one: bool = False) -> Unit | None:
    """The unit or the noun phrase that a text is; None where it is neither.

    Case counts: 5 mW are not 5 MW. A unit in another case is read where only one could be meant (KM), and not where it is
    a symbol of its own: Nm is a newton metre, no nanometre.

    Args:
        one: may a noun be in the singular?
    """

    def sign_of(joint: list[str]) -> int:
        return -1 if "/" in "".join(joint) or "per" in "".join(joint) else 1

    powers: dict[str, int] = {}
    text = _EACH.sub(" per ", text)
    if (
        "^" in text
        and "/" not in text
        and _JUXTAPOSED.fullmatch(text)
        and all(symbol in UNITS for symbol in re.findall(_SYMBOL, text))
    ):
        text = text.replace(" ", "·")
    pieces = re.split(r"( ?/ ?| ?[·*] ?|(?:^| )per )", text)
    sign = 1
    for at, piece in enumerate(pieces):
        if at % 2:
            sign = sign_of([piece])
            continue
        if not piece and at == 0 and sign_of(pieces[1:2]) < 0:  # / hour
            continue
        factor = _FACTOR.fullmatch(piece)
        if factor is None:
            return None
        unit = _known(factor["name"])
        if unit is None:
            noun = None if factor["how"] or factor["power"] else _noun(piece, one or sign < 0)
            if noun is None:
                return None
            unit = ((noun, 1),)
        power = {"s": 2, "c": 3}.get((factor["how"] or " ")[0], 1) * int(factor["power"] or factor["raised"] or 1)
        for name, own in unit:
            powers[name] = powers.get(name, 0) + sign * own * power
    return tuple(sorted(powers.items()))


def _known(name: str) -> Unit | None:
    name = re.sub(r"^degrees? (?=celsius$|fahrenheit$)", "", name, flags=re.IGNORECASE)
    if name in UNITS:
        return UNITS[name]
    folded = _FOLDED.get(name.casefold(), set()) if len(name) > 1 and name not in SPECIAL else set()
    return next(iter(folded)) if len(folded) == 1 else None


# -- numbers

_N = (
    r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?: \d{3})+|\d{1,3}(?:['’]\d{3})+|\d+)(?:\.\d*)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,9})?"
)
NUMBER = re.compile(_N)
_QUANTITY = re.compile(
    r"(?P<sign>[-+])?(?P<money>(?:US)?\$|[€£¥₹])? ?(?P<inner>[-+])?(?:"
    rf"(?P<whole>\d{{1,9}})? ?\\frac\{{(?P<top>[-+]?{_N})\}}\{{(?P<bottom>[-+]?{_N})\}}"
    r"|(?P<full>\d{1,9}) (?P<part>[1-9]\d{0,8})/(?P<of>\d{1,9})"
    rf"|(?P<number>{_N})(?: ?/ ?(?P<under>{_N}))?)"
    r"(?P<percent> ?%| per ?cent| pct)?(?P<scales>(?: (?:dozen|hundred|thousand|million|billion|trillion)(?![^\W_])){0,2})"
    r"(?P<rest>.*)",
    re.DOTALL,
)
_SIGNS = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥", "INR": "₹", "Rs.": "₹", "Rs": "₹"}
_CODE = re.compile(r"^(?:USD|EUR|GBP|JPY|INR|Rs\.?) ?(?=[-+.\d])")  # before a number, as $ stands
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|varphi|psi|omega|Delta|Omega"
NAME = re.compile(
    rf"(?:[^\W\d_]\w{{0,15}}'?|\\(?:{_GREEK})(?:_\w)?|[^\W\d_]_\{{[\w+-]{{1,9}}\}}|[a-zA-Z]\(-?\w{{1,4}}\)"
    r"|(?:m ?)?∠ ?[A-Z]{1,3}|\|[A-Z]{2}\||\\overline ?\{[A-Z]{2}\}|[a-z](?: ?\+ ?[a-z]){1,4})"
)


def quantity(text: str) -> Quantity | None:
    """The quantity that a text is (`writings.plain` wrote it): `name =`, sign, currency, number, scale, percent, unit."""
    if len(text) > LONGEST:
        return None
    before, equals, text = text.rpartition("=")
    name = before.strip()
    if equals and (not NAME.fullmatch(name) or name.casefold() in CHANGING):
        return None
    text = _CODE.sub(lambda found: _SIGNS[found[0].strip()], text.strip())
    if re.fullmatch(r"\([^,()]*\)", text):
        text = text[1:-1].strip()
    found = _QUANTITY.fullmatch(text)
    if found is None or (found["sign"] and found["inner"]):
        return None
    value = _value(found)
    for scale in found["scales"].split():
        value = None if (short := _short(value)) is None else Fraction(short) * _SCALES[scale]
    if value is None:
        return None
    unit = _unit(found["rest"], (found["money"] or "").removeprefix("US"), _of_one(value, found["rest"]))
    if unit is None or (found["percent"] and (unit[0] or found["scales"])):
        return None
    return Quantity(value, bool(found["percent"]), *unit, name=name)


def _of_one(value: Decimal | Fraction, rest: str) -> bool:
    """May a noun be in the singular? Of a part of one it may, where it is none of the words that compare or judge."""
    return value in (1, -1) or (-1 < value < 1 and not re.search(r"(?:ly|er|ed|ing|al|ive|ous|ble|extra)$", rest))


def _unit(rest: str, money: str, one: bool) -> tuple[Unit, bool] | None:
    """What follows a number, and whether that may be a variable; None where it is no unit."""
    rest = TAIL.sub("", rest)
    if not rest and not money:
        return (), False
    run = re.match(r"[^\W\d_]*", rest)
    if run and run[0] and _known(run[0]) is None:
        return None  # 5apples, 5th, 5k
    unit = unit_of((money + rest).strip(), one)
    return None if unit is None else (unit, bool(re.match(r"/?[^\W\d_](?![^\W\d_])", rest)))


def same_quantity(said: Quantity, right: Quantity) -> bool:
    """Equal by value; units and names count where both have them. 50% is 50 and 0.5."""
    if said.name and right.name and said.name != right.name:
        return False
    if said.unit and right.unit:
        if said.unit != right.unit:
            return False
    elif said.glued or right.glued or ((said.percent or right.percent) and (said.unit or right.unit)):
        return False
    if _equal(said.value, right.value):
        return True
    if said.percent == right.percent:
        return False
    share, plain = (said, right) if said.percent else (right, said)
    part = _short(share.value)
    return part is not None and _equal(Fraction(part) / 100, plain.value)


def _value(found: re.Match[str]) -> Decimal | Fraction | None:
    """A number, exact, and computed with only where that takes no time."""
    sign, (over, under) = -1 if "-" in (found["sign"], found["inner"]) else 1, found.group("number", "under")
    if over is not None and under is None:
        number = decimal(over)
        return None if number is None else number.copy_negate() if sign < 0 else number
    over, under = over or found["top"] or found["part"], under or found["bottom"] or found["of"]
    parts = [_short(decimal(text)) for text in (over, under, found["whole"] or found["full"] or "0")]
    if None in parts or not parts[1]:
        return None
    top, bottom, whole = (Fraction(part or 0) for part in parts)
    if (found["whole"] or found["full"]) and not 0 < top < bottom:
        return None  # 2\frac{3}{2} may be a product
    if found["full"] and len(found["part"]) == 3 and len(found["full"]) <= 3:
        return None  # 10 100/300 may have thousands
    return sign * (whole + top / bottom)


def decimal(text: str) -> Decimal | None:
    try:
        return Decimal(re.sub("[,'’ ]", "", text))
    except InvalidOperation:  # an exponent beyond all bounds
        return None


def _short(number: Decimal | Fraction | None) -> Decimal | Fraction | None:
    """The number, unless it has so many digits that computing with it would take long."""
    if isinstance(number, Decimal) and (len(number.as_tuple().digits) > DIGITS or abs(number.adjusted()) > DIGITS):
        return None
    return number


def _equal(a: Decimal | Fraction, b: Decimal | Fraction) -> bool:
    if isinstance(a, Decimal) and isinstance(b, Decimal):
        return a == b
    short = _short(a), _short(b)
    return short[0] is not None and short[1] is not None and Fraction(short[0]) == Fraction(short[1])
