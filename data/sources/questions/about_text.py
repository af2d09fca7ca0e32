"""Questions about a passage of documentation."""

import random
import re

from data.sources.questions.kinds import ABOUT_TEXT, LANGUAGES, Ask, Kind, worded
from data.sources.questions.material import Passage

STOP_WORDS = {
    *("about", "after", "also", "because", "before", "being", "could", "different", "does", "each", "from", "given"),
    *("have", "into", "itself", "more", "most", "must", "only", "other", "otherwise", "over", "same", "should", "such"),
    *("than", "that", "their", "them", "then", "there", "these", "they", "this", "those", "under", "used", "using"),
    *("when", "where", "which", "while", "will", "with", "without", "would", "your"),
}
READERS = ("a colleague", "my manager", "a new member of the team", "a customer", "a student", "the whole team")


def _about(*forms: str, longest: int = 1_700, **choices: tuple[str, ...]) -> Ask:
    """Returns an `ask` that fills {text} and {subject}."""
    fill = worded(*forms, **choices)

    def ask(passage: Passage, rng: random.Random) -> str | None:
        return fill(rng, text=passage.text, subject=passage.subject) if len(passage.text) <= longest else None

    return ask


def _terms(passage: Passage) -> list[str]:
    """Returns the longer words of a passage that occur more than once, the most frequent first."""
    words = [word.lower() for word in re.findall(r"[A-Za-z]{5,}", passage.text)]
    counted = {word: words.count(word) for word in dict.fromkeys(words) if word not in STOP_WORDS}
    return sorted((word for word, count in counted.items() if count > 1), key=lambda word: -counted[word])


def _answer(passage: Passage, rng: random.Random) -> str | None:
    """Asks about a condition that the passage states, or about one of its terms."""
    conditions = [found for one in passage.sentences if (found := re.match(r"(If|When) ([^,]{12,90}), ", one))]
    terms = _terms(passage)
    if conditions:
        found = rng.choice(conditions)
        question = f"What happens {found[1].lower()} {found[2]}?"
    elif terms:
        question = rng.choice(
            ("What does the text say about the {}?", "What is meant by {} here?", "Why does the {} matter?")
        ).format(rng.choice(terms[:3]))
    else:
        return None
    return rng.choice(
        (
            f"{passage.text}\n\n{question}",
            f"Read the text and answer the question.\n\nText: {passage.text}\n\nQuestion: {question}",
            f"{question} Use only this text:\n\n{passage.text}",
            f'Answer from the text, or say "The text does not say."\n\n{passage.text}\n\n{question}',
        )
    )


def _true_or_false(passage: Passage, rng: random.Random) -> str | None:
    if not passage.sentences:
        return None
    claim = rng.choice(passage.sentences)
    if rng.random() < 0.5:
        claim = re.sub(r"\b(is|are|can|will|must|should)\b", r"\1 not", claim, count=1)
    asked = "Is this statement true according to the text? Answer with yes or no and a reason."
    return f"{asked}\n\nStatement: {claim}\n\nText: {passage.text}"


def _order(passage: Passage, rng: random.Random) -> str | None:
    chosen = passage.sentences[:5]
    if len(chosen) < 3:
        return None
    mixed = rng.sample(chosen, len(chosen))
    listed = "\n".join(f"{number}. {one}" for number, one in enumerate(mixed, start=1))
    return f"These sentences are in the wrong order. Put them in the right order.\n\n{listed}"


def _correct(passage: Passage, rng: random.Random) -> str | None:
    chosen = passage.sentences[:3]
    if len(chosen) < 2:
        return None
    words = " ".join(chosen).split(" ")
    for at in rng.sample(range(len(words)), max(len(words) // 8, 2)):
        word = words[at]
        if word in ("a", "the", "an", "is", "are", "of", "to"):
            words[at] = ""
        elif len(word) > 4 and word.isalpha():
            middle = rng.randrange(1, len(word) - 2)
            words[at] = word[:middle] + word[middle + 1] + word[middle] + word[middle + 2 :]
    wrong = " ".join(filter(None, words))
    asked = rng.choice(("Correct the spelling and grammar:", "Proofread this paragraph and list your corrections."))
    return f"{asked}\n\n{wrong}"


def _continue(passage: Passage, rng: random.Random) -> str | None:
    chosen = passage.sentences
    if len(chosen) < 4:
        return None
    begin = " ".join(chosen[: len(chosen) // 2])
    asked = rng.choice(("Continue this text in the same style.", "Write the next paragraph of this manual."))
    return f"{asked}\n\n{begin}"


def _sentence(passage: Passage, rng: random.Random) -> str | None:
    if not passage.sentences:
        return None
    one = rng.choice(passage.sentences)
    return rng.choice(
        (
            f'Say this in simpler words: "{one}"',
            f"Give three other ways to write this sentence.\n\n{one}",
            f"Explain this sentence from the documentation of {passage.subject}: {one}",
            f"Turn this sentence into a question: {one}",
            f"Is the tone of this sentence formal or informal? Why?\n\n{one}",
        )
    )


def _translate_sentence(passage: Passage, rng: random.Random) -> str | None:
    if not passage.sentences:
        return None
    return f"Translate English to {rng.choice(LANGUAGES)}: {rng.choice(passage.sentences)}"


def _keywords(passage: Passage, rng: random.Random) -> str | None:
    terms = _terms(passage)[:3]
    if len(terms) < 2:
        return None
    return rng.choice(
        (
            f"List the five most important keywords of this text.\n\n{passage.text}",
            f"Define these words as the text uses them: {', '.join(terms)}.\n\n{passage.text}",
            f'How often does the word "{terms[0]}" occur in this text?\n\n{passage.text}',
            f'Copy the sentence that mentions "{terms[1]}".\n\n{passage.text}',
        )
    )


KINDS = tuple(
    Kind(name=name, pieces="passages", ask=ask, follow_ups=ABOUT_TEXT)
    for name, ask in {
        "summarise": _about(
            "Summarise this page of documentation.\n\n{text}",
            "Summarize: {text}",
            "{text}\n\nSum this up in {length}.",
            "Give me the gist of this text in {length}.\n\n{text}",
            length=("one sentence", "two sentences", "three sentences", "at most fifty words"),
        ),
        "answer from text": _answer,
        "true or false": _true_or_false,
        "order": _order,
        "correct text": _correct,
        "continue text": _continue,
        "sentence": _sentence,
        "translate sentence": _translate_sentence,
        "keywords": _keywords,
        "translate text": _about(
            "Translate this text to {language}.\n\n{text}",
            "{text}\n\nTranslate the above into {language}.",
            longest=800,
            language=LANGUAGES,
        ),
        "bullet points": _about(
            "Turn this into bullet points.\n\n{text}",
            "List the main points of this text.\n\n{text}",
            "What are the {number} most important facts here?\n\n{text}",
            number=("three", "four", "five"),
        ),
        "json": _about(
            "Write the content of this text as JSON with the keys `title`, `summary` and `points`.\n\n{text}",
            "Extract every name of a function, class or module in this text as a JSON list.\n\n{text}",
            longest=1_200,
        ),
        "table": _about(
            "Put the information of this text into a table with the columns {columns}.\n\n{text}",
            longest=1_200,
            columns=("Term and Meaning", "Topic, Rule and Example", "Name and Purpose"),
        ),
        "e-mail": _about(
            "Write an e-mail to {reader} about this:\n\n{text}",
            "Write a short and polite e-mail to {reader} that recommends {subject}. Background:\n\n{text}",
            longest=1_200,
            reader=READERS,
        ),
        "classify": _about(
            "Which of these describes the text best: tutorial, reference, warning, history, advertisement?\n\n{text}",
            "Is this text for beginners or for experts? Answer with one word, then give the reason.\n\n{text}",
            "Classify the topic of this text: files, network, text, numbers, time, language, or other.\n\n{text}",
            longest=1_200,
        ),
        "title": _about("Give this text a title.\n\n{text}", "Suggest three headlines for this page.\n\n{text}"),
        "simplify": _about(
            "Rewrite this text for {reader}.\n\n{text}",
            "Explain this as you would to a child of ten.\n\n{text}",
            "Rewrite this in plain English and short sentences.\n\n{text}",
            longest=1_000,
            reader=READERS,
        ),
        "quiz": _about(
            "Write {number} questions that test whether someone has understood this text, with the answers.\n\n{text}",
            "Make a multiple-choice question out of this text.\n\n{text}",
            number=("two", "three", "five"),
        ),
        "advice": _about(
            "When would I need {subject}? Here is what the documentation says.\n\n{text}",
            "What should a beginner know about {subject} after reading this?\n\n{text}",
            "Write a short example in Python for what is described here.\n\n{text}",
        ),
    }.items()
)
