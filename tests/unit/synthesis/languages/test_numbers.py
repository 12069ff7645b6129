"""Numbers of a translation are those of the original, in the digits and marks of either language."""

from decimal import Decimal

import pytest

from megatron_post.synthesis.languages.numbers import changed_numbers, numbers_of


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,000.5 grams", ["1000.5"]),
        ("from 1,2 to 3.", ["1", "2", "3"]),
        ("on 12/05/2024 at 10:30", ["12", "5", "2024", "10", "30"]),
        ("$1{,}250 and 1\\,250", ["1250", "1250"]),
        ("12,34,567 rupees", ["1234567"]),
        ("version 1.2.3", ["1", "2", "3"]),
        ("x_1^2 = 7%", ["1", "2", "7"]),
        ("-5 and \u22126 or -$7, but 3-4 and a-1", ["-5", "-6", "-7", "3", "4", "1"]),
        ("1½ cups, 10¹² and x₁", ["1", "1", "2", "10", "12", "1"]),
        ("$.50 and .5", ["0.50", "0.5"]),
        ("none", []),
    ],
)
def test_numbers_of_english(text: str, numbers: list[str]) -> None:
    assert sorted(numbers_of(text).elements()) == sorted(map(Decimal, numbers))


@pytest.mark.parametrize(
    ("text", "translation"),
    [
        ("1,000.5 g", "1.000,5 g"),
        ("1,000.5 g", "1\u202f000,5 g"),
        ("12,345 m and 3 m", "12 345 m und 3 m"),
        ("bags of 2 and 100 and 300", "sacs de 2 100 300"),
        ("1,000,000 people", "1'000'000 Personen"),
        ("100,000 rupees", "1,00,000 रुपये"),
        ("100,000 rupees", "१,००,००० रुपये"),
        ("1.5 of 25", "๑.๕ จาก ๒๕"),
        ("1.5 of 2,500", "١٫٥ من ٢٬٥٠٠"),
        ("1.234 and 1,234", "1,234 und 1.234"),
        ("1.234 and 1,234", "1.234 und 1,234"),
        ("at 10:30", "um 10.30 Uhr"),
        ("the point (1, 2)", "der Punkt (1,2)"),
        ("half of them", "die Hälfte davon"),
        ("2 for $3.50", "2 für 3,50 $"),
        ("2 for $.50", "2 für 0,50 $"),
        ("at -5 and -$1,000", "bei \u22125 und \u20131.000 $"),
        ("½ cup of 10^3", "1/2 Tasse von 10³"),
        ("from 1-2", "von 1\u20132"),
    ],
)
def test_the_same_numbers(text: str, translation: str) -> None:
    assert changed_numbers(text, translation) == ""


@pytest.mark.parametrize(
    ("text", "translation", "changes"),
    [
        ("12 cakes", "13 Kuchen", "without 12; added 13"),
        ("12 cakes", "zwölf Kuchen", "without 12"),
        ("cakes", "100 Kuchen", "added 100"),
        ("3 and 3", "3", "without 3"),
        ("1.5 km", "15 km", "without 1.5; added 15"),
        ("1,500 km", "1,5 km", "without 1500; added 1,5"),
        ("1,500.25 km", "1.500 km", "without 1500.25; added 1.500"),
        ("2 and 100", "2 100 100", "added 100"),
        ("at -5", "bei 5", "without -5; added 5"),
        ("x²", "x³", "without 2; added 3"),
        ("½ cup", "¼ Tasse", "without 2; added 4"),
    ],
)
def test_other_numbers(text: str, translation: str, changes: str) -> None:
    assert changed_numbers(text, translation) == changes
