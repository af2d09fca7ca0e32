"""Questions with numbers: word problems, constants of the library, puzzles, and facts to extract from notes."""

import random

from data.sources.questions.kinds import CALCULATED, EVERYDAY, Kind
from data.sources.questions.material import Constant

NAMES = (
    *("Anna", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mei"),
    *("Nora", "Omar", "Paula", "Quentin", "Rosa", "Samir", "Tessa", "Uma", "Viktor", "Wanda", "Yusuf", "Zoe"),
)
GOODS = (
    "apples",
    "pencils",
    "tickets",
    "books",
    "eggs",
    "bottles",
    "postcards",
    "chairs",
    "candles",
    "tiles",
    "stamps",
)
TOWNS = ("Lisbon", "Ghent", "Turin", "Leeds", "Graz", "Bergen", "Lyon", "Porto", "Gdansk", "Basel", "Cork", "Malmo")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("library", "swimming pool", "town hall", "museum", "market", "theatre", "school", "harbour", "bakery", "park")
UNITS = (
    *(("kilometres", "miles"), ("kilograms", "pounds"), ("litres", "gallons"), ("degrees Celsius", "Fahrenheit")),
    *(("hours", "minutes"), ("weeks", "hours"), ("metres", "feet"), ("square metres", "square centimetres")),
)


def _word_problem(number: int, rng: random.Random) -> str:
    one, other = rng.sample(NAMES, 2)
    goods, count, price, more = rng.choice(GOODS), rng.randint(3, 40), rng.randint(2, 25), rng.randint(2, 12)
    speed, hours = rng.randint(4, 30) * 5, rng.randint(2, 9)
    return rng.choice(
        (
            f"{one} buys {count} {goods} at {price} euros each and pays with {count * price // 50 * 50 + 100} euros."
            " How much change is given back?",
            f"{one} has {count} {goods}. {other} has {more} times as many. How many do they have together?",
            f"A train travels at {speed} kilometres an hour for {hours} hours and then {count} kilometres more."
            " How far does it go?",
            f"{one} reads {count} pages on {rng.choice(DAYS)} and {more} pages more on each day after that."
            f" How many pages are read in {hours} days?",
            f"{one} fills {count * more} {goods} into boxes of {more}. {other} takes away {rng.randint(1, count - 1)}"
            " boxes. How many boxes are left?",
            f"A coat costs {price * 20} euros. It is reduced by {rng.choice((10, 15, 20, 25, 40))} per cent, and then"
            f" {one} has a voucher for {more} euros. What does {one} pay?",
            f"{one} is {count} years old and {other} is {more} years older. How old will they be together in {hours}"
            " years?",
            f"A tank holds {count * 100} litres. A tap fills {price} litres a minute while {more} litres a minute run"
            " out. Is it full after an hour?",
            f"{count} people share the cost of {count * price} euros for {goods}; {rng.randint(1, count - 1)} of them"
            " do not pay. How much does each of the others pay?",
        )
    )


def _arithmetic(number: int, rng: random.Random) -> str:
    a, b, c = rng.randint(12, 400), rng.randint(3, 90), rng.randint(2, 60)
    per_cent, old, new = rng.choice((5, 8, 12, 15, 20, 35, 60)), rng.randint(20, 90) * 5, rng.randint(20, 90) * 4
    source, unit = rng.choice(UNITS)
    return rng.choice(
        (
            f"What is {a} * {b} + {c}?",
            f"Calculate ({a} + {b}) / {c} and round to two digits.",
            f"What is {per_cent} per cent of {old}?",
            f"A price rises from {old} to {old + new}. By how many per cent is that?",
            f"How many {unit} are {a} {source}?",
            f"Solve for x: {b}x + {c} = {a + b * c}.",
            f"What is the next number: {c}, {c + b}, {c + 2 * b}, {c + 3 * b}?",
            f"Is {a * 2 + 1} a prime number? Explain how you know.",
            f"Which is larger, {b}/{c + 1} or {b + 2}/{c + 3}?",
            f"What is the mean of {a}, {b}, {c} and {old}?",
            f"Two dice are rolled. How likely is a sum of {rng.randint(2, 12)}? And how likely is {a} heads in {a + b}"
            " throws of a coin, roughly?",
        )
    )


def _constant(constant: Constant, rng: random.Random) -> str:
    value, times, more = constant.value, rng.randint(2, 24), rng.randint(3, 60)
    name = f"`{constant.name}`, which is {value} in Python's module `{constant.module}`,"
    return rng.choice(
        (
            f"A program reads {name} bytes {times} times a second. How many bytes does it read in {more} seconds?",
            f"A queue has room for {name} messages. {times} workers each add {more} messages. How many places are left"
            " or missing?",
            f"A page shows {more} lines, and a log has {times} times {name} lines. How many pages are needed?",
            f"Write the number {name} in binary and in hexadecimal.",
            f"What is {name} multiplied by {times}, minus {more}? Show each step.",
            f"How would you explain to a colleague what {name} is for? Guess from its name.",
        )
    )


def _logic(number: int, rng: random.Random) -> str:
    a, b, c, d = rng.sample(NAMES, 4)
    more, less = rng.choice(
        (("older", "youngest"), ("taller", "shortest"), ("faster", "slowest"), ("richer", "poorest"))
    )
    brothers, days = rng.randint(2, 6), rng.randint(3, 90)
    return rng.choice(
        (
            f"{a} is {more} than {b}. {c} is {more} than {a}. {d} is {more} than {c}. Who is the {less}?",
            f"{a} has {brothers} brothers, and each of them has {rng.randint(1, 3)} sisters. How many children can"
            " the family have?",
            f"If today is {rng.choice(DAYS)}, which day is it in {days} days?",
            f"{a}, {b} and {c} sit in a row. {a} does not sit beside {b}. Who sits in the middle?",
            f"All {rng.choice(GOODS)} in {a}'s bag are red. {b} takes one from it. What colour is it?",
            f"{a} says that {b} lies. {b} says that {c} lies. {c} says that both lie. Who tells the truth?",
            f"A clock shows {rng.randint(1, 12)}:{rng.choice(('00', '15', '30', '45'))}. What is the angle between its"
            f" hands, and where are they {days} minutes later?",
            f"{a} walks {days} metres north, {brothers * 10} metres east and {days} metres south. How far is it back?",
            f"There are {brothers + 3} socks of each of {brothers} colours in a drawer. How many must {a} take in the"
            " dark to have a pair?",
        )
    )


def _notice(rng: random.Random) -> str:
    """Returns a notice of a few sentences with names, places, days and numbers."""
    one, other, third = rng.sample(NAMES, 3)
    town, place, day, goods = rng.choice(TOWNS), rng.choice(PLACES), rng.choice(DAYS), rng.choice(GOODS)
    year, count, cost = rng.randint(1880, 2020), rng.randint(20, 900), rng.randint(3, 90) * 1000
    first = rng.choice(
        (
            f"The {place} of {town} opened again on {day} after repairs that took {rng.randint(2, 30)} months.",
            f"On {day} the council of {town} decided to close its {place}, which was built in {year}.",
            f"A record {count} visitors came to the {place} in {town} on {day}.",
        )
    )
    middle = rng.sample(
        (
            f"The costs were {cost:,} euros, a third more than planned.",
            f"{one} {rng.choice(('Keller', 'Moreau', 'Rossi', 'Novak', 'Silva'))}, who has led the house since"
            f" {year + rng.randint(5, 60)}, called it a good day for everyone.",
            f"Volunteers around {other} sold {count // 2} {goods} to raise money.",
            f"Tickets cost {rng.randint(2, 15)} euros, and children under {rng.randint(6, 14)} pay nothing.",
            f"It is open from {rng.randint(7, 11)} to {rng.randint(16, 22)} o'clock, except on {rng.choice(DAYS)}.",
            f"Critics such as {third} would have preferred a new building near the station.",
            f"In {year} the first stone was laid by the mayor of that time, a dealer in {rng.choice(GOODS)}.",
            f"Rain is expected, so that the concert planned for the evening may be moved to {rng.choice(DAYS)}.",
        ),
        rng.randint(3, 6),
    )
    return " ".join([first, *middle])


def _notice_question(number: int, rng: random.Random) -> str:
    text = _notice(rng)
    return rng.choice(
        (
            f"Summarize: {text}",
            f"{text}\n\nWho is mentioned in this text, and what did they do?",
            f"Extract all numbers from this text, with what they mean, as JSON.\n\n{text}",
            f"{text}\n\nWhen did this happen, and where?",
            f"Write a headline for this news item: {text}",
            f"Make a table of the people, places and days in this text.\n\n{text}",
            f"Rewrite this news item as a letter from a visitor.\n\n{text}",
            f"Read both items. What do they have in common?\n\n1. {text}\n\n2. {_notice(rng)}",
            f"{text}\n\nWhat did it cost? Answer with a number, or say that the text does not tell.",
        )
    )


def _translate_notice(number: int, rng: random.Random) -> str:
    language = rng.choice(("French", "German", "Spanish", "Italian", "Portuguese", "Dutch", "Polish"))
    sentence = ". ".join(_notice(rng).split(". ")[:2]).rstrip(".") + "."
    return rng.choice((f"Translate English to {language}: {sentence}", f"Say this in {language}: {sentence}"))


def _records(number: int, rng: random.Random) -> str:
    people = rng.sample(NAMES, rng.randint(3, 5))
    lines = [
        f"- {name} from {rng.choice(TOWNS)} ordered {rng.randint(2, 60)} {rng.choice(GOODS)} on {rng.choice(DAYS)}"
        f" for {rng.randint(5, 400)} euros"
        for name in people
    ]
    asked = rng.choice(
        (
            "Who paid the most?",
            "Turn these orders into a JSON list.",
            "Turn these orders into CSV with a header.",
            "Sort the orders by price, the highest first.",
            "How much was paid in all?",
            "Group the orders by day.",
            f"What did {rng.choice(people)} order? Write one sentence.",
            "Write a short reminder to everyone who has not yet paid; assume that the first two have paid.",
        )
    )
    listed = "\n".join(lines)
    return rng.choice((f"{asked}\n\n{listed}", f"These are today's orders:\n{listed}\n\n{asked}"))


def _classify_short(number: int, rng: random.Random) -> str:
    goods = rng.sample(GOODS, 4)
    reviews = (
        f"The {goods[0]} arrived on {rng.choice(DAYS)}, two days late, and half of them were broken.",
        f"Lovely {goods[1]}, and {rng.choice(NAMES)} at the counter could not have been kinder.",
        f"The {goods[2]} are fine for the price of {rng.randint(3, 60)} euros, nothing special.",
        f"I asked for {rng.randint(2, 30)} {goods[3]} and got {rng.randint(31, 60)}. Nobody answers the telephone.",
        f"{rng.choice(NAMES)} in {rng.choice(TOWNS)} says these are the best {goods[0]} in the country. I agree.",
    )
    chosen = rng.sample(reviews, rng.randint(1, 3))
    listed = "\n".join(chosen)
    asked = rng.choice(
        ("Is this review positive, negative or neutral?", "Give each review one to five stars, with a reason.")
    )
    return f"{asked}\n\n{listed}" if rng.random() < 0.7 else f"Answer this customer politely.\n\n{chosen[0]}"


KINDS = (
    Kind(name="constants", pieces="constants", ask=_constant, follow_ups=CALCULATED),
    Kind(name="word problem", pieces="numbers", ask=_word_problem, follow_ups=CALCULATED),
    Kind(name="arithmetic", pieces="numbers", ask=_arithmetic, follow_ups=CALCULATED),
    Kind(name="logic", pieces="numbers", ask=_logic, follow_ups=CALCULATED),
    Kind(name="news item", pieces="numbers", ask=_notice_question, follow_ups=EVERYDAY),
    Kind(name="translate news", pieces="numbers", ask=_translate_notice, follow_ups=EVERYDAY),
    Kind(name="extract", pieces="numbers", ask=_records, follow_ups=EVERYDAY),
    Kind(name="reviews", pieces="numbers", ask=_classify_short, follow_ups=EVERYDAY),
)
