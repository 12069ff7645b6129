# ruff: noqa: E501  # sentences
"""Problems about cakes in eight languages, and a scripted translator. The baker's name selects its error."""

import re
from typing import Any

from tests.scripted_server import Body

# question and solution. {a} and {b} are numbers of the prose, and {x}, {y} and {z} those of formulas
PHRASES = {
    "en": (
        "{name} bakes {a} cakes in the morning and sells {b} of them at the market. How many cakes are left in "
        "the evening?",
        "{name} starts the day with {a} cakes and sells {b} of them to the neighbours.\n\nWe subtract the cakes "
        "that were sold from all the cakes that were baked: ${x} - {y} = {z}$.\n\nThe final answer is: "
        "$\\boxed{{{z}}}$",
    ),
    "de": (
        "{name} backt am Morgen {a} Kuchen und verkauft {b} davon auf dem Markt. Wie viele Kuchen sind am Abend "
        "noch übrig?",
        "{name} beginnt den Tag mit {a} Kuchen und verkauft {b} davon an die Nachbarn.\n\nWir ziehen die "
        "verkauften Kuchen von allen Kuchen ab, die gebacken wurden: ${x} - {y} = {z}$.\n\nDie endgültige "
        "Antwort lautet: $\\boxed{{{z}}}$",
    ),
    "fr": (
        "{name} prépare {a} gâteaux le matin et en vend {b} au marché. Combien de gâteaux reste-t-il le soir ?",
        "{name} commence la journée avec {a} gâteaux et en vend {b} aux voisins.\n\nNous soustrayons les gâteaux "
        "vendus de tous les gâteaux qui ont été préparés : ${x} - {y} = {z}$.\n\nLa réponse finale est : "
        "$\\boxed{{{z}}}$",
    ),
    "it": (
        "{name} prepara {a} torte al mattino e ne vende {b} al mercato. Quante torte restano la sera?",
        "{name} comincia la giornata con {a} torte e ne vende {b} ai vicini.\n\nSottraiamo le torte vendute da "
        "tutte le torte che sono state preparate: ${x} - {y} = {z}$.\n\nLa risposta finale è: $\\boxed{{{z}}}$",
    ),
    "pt": (
        "{name} prepara {a} bolos de manhã e vende {b} deles na feira. Quantos bolos sobram à noite?",
        "{name} começa o dia com {a} bolos e vende {b} deles aos vizinhos.\n\nSubtraímos os bolos vendidos de "
        "todos os bolos que foram preparados: ${x} - {y} = {z}$.\n\nA resposta final é: $\\boxed{{{z}}}$",
    ),
    "hi": (
        "{name} सुबह {a} केक बनाती है और उनमें से {b} बाज़ार में बेच देती है। शाम को कितने केक बचते हैं?",
        "{name} दिन की शुरुआत {a} केक से करती है और उनमें से {b} पड़ोसियों को बेच देती है।\n\nहम बनाए गए सभी केक में "
        "से बेचे गए केक घटाते हैं: ${x} - {y} = {z}$।\n\nअंतिम उत्तर है: $\\boxed{{{z}}}$",
    ),
    "es": (
        "{name} hornea {a} pasteles por la mañana y vende {b} de ellos en el mercado. ¿Cuántos pasteles quedan "
        "por la noche?",
        "{name} empieza el día con {a} pasteles y vende {b} de ellos a los vecinos.\n\nRestamos los pasteles "
        "vendidos de todos los pasteles que se hornearon: ${x} - {y} = {z}$.\n\nLa respuesta final es: "
        "$\\boxed{{{z}}}$",
    ),
    "th": (
        "{name} อบเค้ก {a} ชิ้นในตอนเช้าและขายไป {b} ชิ้นที่ตลาด ตอนเย็นเหลือเค้กกี่ชิ้น",
        "{name} เริ่มต้นวันด้วยเค้ก {a} ชิ้นและขายให้เพื่อนบ้านไป {b} ชิ้น\n\nเรานำจำนวนเค้กที่ขายไปลบออกจากเค้กทั้งหมดที่อบ: "
        "${x} - {y} = {z}$\n\nคำตอบสุดท้ายคือ: $\\boxed{{{z}}}$",
    ),
}
CODE = "\n\n```python\n# the cakes that are left\nprint({x} - {y})\n```"
BAKERS = ["Anna", "Local", "Cody", "Renumbered", "Half", "Chinese", "Brief", "Faraway"]
_CODES = {"German": "de", "French": "fr", "Italian": "it", "Portuguese": "pt", "Hindi": "hi", "Spanish": "es"}
_CODES |= {"Thai": "th"}
_BAKED = re.compile(r"<message_1>\s*(\w+)\D*?([\d.,\s]*\d)\D*?([\d.,]*\d)", re.DOTALL)
_TO = re.compile(r"from English to (\w+)\.|from (\w+) to English")


def texts(code: str, name: str, a: int, b: int, *, local: bool = False) -> list[str]:
    """The question and the solution. local: with a point between the thousands of numbers in the prose."""
    marked = {"a": f"{a:,}", "b": f"{b:,}"}
    if local:
        marked = {key: text.replace(",", ".") for key, text in marked.items()}
    values: dict[str, Any] = {"name": name, **marked, "x": a, "y": b, "z": a - b}
    question, solution = (phrase.format(**values) for phrase in PHRASES[code])
    return [question, solution + (CODE.format(**values) if name in ("Cody", "Codysseus") else "")]


def row(name: str, a: int, b: int) -> dict[str, Any]:
    question, solution = texts("en", name, a, b)
    return {"question": question, "answer": solution}


def answer(body: Body) -> str | dict[str, Any]:
    prompt = body["messages"][0]["content"]
    to, back_from = _TO.search(prompt).groups()  # type: ignore[union-attr]  # each prompt has it
    name, a, b = _read(prompt)
    times = prompt.count("</message_") // 2  # that the question is asked in the dialog
    if back_from:
        far = ["A train leaves the town.", "It is late."]
        return _reply(times * (far if name == "Faraway" else texts("en", name, a, b)))
    return _translated(_CODES[to], name, a, b, times)


def fault(body: Body, attempt: int) -> str | None:
    prompt = body["messages"][0]["content"]
    is_back = prompt.startswith("Translate the messages below from") and "to English" in prompt[:120]
    return "400" if f"\nRefused{'back' if is_back else ''} " in prompt else None


def _read(prompt: str) -> tuple[str, int, int]:
    """The baker and the numbers of the question."""
    found = _BAKED.search(prompt)
    assert found is not None, prompt
    first, second = (int(re.sub(r"\D", "", number)) for number in found.group(2, 3))
    return found[1], first, second


def _reply(parts: list[str]) -> str:
    return "\n".join(f"<message_{n}>\n{part}\n</message_{n}>" for n, part in enumerate(parts, start=1))


def _translated(code: str, name: str, a: int, b: int, times: int) -> str | dict[str, Any]:
    question, solution = texts(code, name, a, b, local=name == "Local")
    match name:
        case "Renumbered":
            question = question.replace(str(b), str(b + 1))
        case "Added":
            solution += " 100"
        case "Codysseus":
            solution = solution.replace("# the cakes that are left", "# die restlichen Kuchen")
        case "Formula":
            solution = solution.replace(f"{a} - {b}", f"{a} + {b}")
        case "English":
            question, solution = texts("en", name, a, b)
        case "Half":
            own, english = solution.split("\n\n"), texts("en", name, a, b)[1].split("\n\n")
            solution = "\n\n".join([own[0], english[1], own[2]])
        case "Dutch":
            question = (
                f"{name} bakt 's ochtends {a:,} taarten en verkoopt er {b} op de markt. Hoeveel taarten "
            )
            question += "zijn er 's avonds nog over?"
        case "Chinese":
            solution = solution.replace("Kuchen", "蛋糕", 1)
        case "Lookalike":
            solution = solution.replace("Kuchen", "Kuсhen", 1)  # a Cyrillic letter
        case "Brief":
            question = f"{name}: {a} Kuchen, {b} weg?"
        case "Prose":
            return "I would rather not."
        case "Chatty":
            return "Here are the translations.\n" + _reply([question, solution])
        case "Single":
            return _reply([question])
        case "Empty":
            return _reply([question, " "])
        case "Cut":
            return {"content": _reply([question, solution]), "finish_reason": "length"}
    return _reply(times * [question, solution])
