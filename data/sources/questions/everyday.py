"""Everyday questions about subjects: writing, roles, science, history, facts, plans."""

from data.sources.questions.kinds import EVERYDAY, Ask, Kind, worded


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(part.split()) for part in text.split(";"))


SCIENCE = _split(
    """photosynthesis; the tides; how vaccines work; black holes; the water cycle; plate tectonics; why the sky is
    blue; natural selection; the periodic table; electric motors; how batteries store energy; the greenhouse
    effect; gravity; DNA; the speed of light; lightning; how bees find flowers; prime numbers; probability; the
    Pythagorean theorem; sound waves; why ice floats; the human heart; how antibiotics work; earthquakes;
    volcanoes; the seasons; eclipses of the moon; radioactive decay; semiconductors; how a refrigerator cools;
    nuclear fusion; entropy; the ozone layer; fermentation; how birds fly; magnets; the nervous system; the immune
    system; comets; how rockets work in empty space; standard deviation; exponential growth; binary numbers;
    encryption; solar panels; wind turbines; why metals conduct electricity; acids and bases; enzymes; coral
    reefs; food chains; fossils; glaciers; how radar works; lenses and telescopes; friction; buoyancy; the Doppler
    effect; chaos theory; the golden ratio; how the eye sees colours; sleep; the carbon cycle; hibernation;
    mushrooms; ocean currents; rainbows; crystals"""
)
HISTORY = _split(
    """the printing press; the French Revolution; the Silk Road; ancient Athens; the Roman roads; the Renaissance;
    the Industrial Revolution; the Black Death; the moon landing; the fall of the Berlin Wall; the invention of
    writing; Stoic philosophy; the Enlightenment; the Ottoman Empire; medieval guilds; the Magna Carta; the Inca
    Empire; samurai; the Great Depression; the history of tea; the history of chess; jazz; Greek tragedy;
    impressionist painting; Gothic cathedrals; the suffragettes; the League of Nations; Confucius; free will;
    utilitarianism; social contracts; the Library of Alexandria; the Vikings; the Phoenicians; the Mughal Empire;
    the Meiji Restoration; decolonisation; the abolition of slavery; the Hanseatic League; the Congress of Vienna;
    the first world fairs; the Dutch tulip mania; oral traditions; folk tales; haiku; opera; the novel;
    photography as an art; calendars; the metric system; money; the history of bread; the first railways; the
    telegraph; the Suez Canal; mercantilism; the Cold War; the Marshall Plan"""
)
SKILLS = _split(
    """baking bread; changing a bicycle tyre; learning to swim; growing tomatoes; packing for a week of hiking;
    preparing for a job interview; saving money for a holiday; learning a foreign language; training a puppy;
    cleaning a kitchen; cooking rice; planning a birthday party; moving to a new flat; running five kilometres;
    keeping a diary; reading more books; giving a talk; writing a CV; repairing a zip; ironing a shirt; sharpening
    knives; making coffee; making a family budget; choosing a laptop; taking better photos; starting a vegetable
    garden; sleeping better; working from home; organising a bookshelf; playing the guitar; learning to draw;
    caring for houseplants; painting a room; building a bird house; hosting a dinner for six; buying a used car;
    reducing food waste; composting; studying for an exam; remembering names; travelling with small children;
    negotiating a salary; making soup; recycling at home; knitting a scarf; planning a weekend in Lisbon; planning
    three days in Kyoto; camping in the rain; setting up a home office; cutting down on screen time; keeping bees;
    brewing beer; sewing on a button; swimming outdoors; finding a flat; writing a thank-you note; learning to
    touch-type; riding a horse; making jam; feeding garden birds"""
)
SCENES = _split(
    """a lighthouse keeper in a storm; a lost umbrella; the last bookshop in town; a robot that learns to bake; an
    empty train at midnight; a letter that arrives thirty years late; a market in the early morning; a dragon who
    fears fire; two neighbours and one apple tree; a city without clocks; a violin found in an attic; the first
    snow of the year; a cat who runs a hotel; a garden on the moon; an old map with one name too many; a school
    for inventors; a broken bridge; a summer at the sea; a chess match between friends; a mountain hut; a river
    that changes its course; a mistake in a recipe; the oldest tree of the forest; a night at the museum; a ferry
    in the fog; a clockmaker's apprentice; a dog who misses the bus; a village that votes on everything; a kite; a
    power cut; a picnic that goes wrong; a song nobody remembers; a key without a door; a radio that plays
    tomorrow's news; a very small kingdom; a stranger on a bench; a bakery at four in the morning; a message in a
    bottle; a race between two sailing boats; a circus in winter; a quiet astronaut; a suitcase full of sand; a
    lost glove; a door in the library; a wedding in the rain; a fox in the city"""
)
OCCASIONS = _split(
    """a meeting that moves to Thursday; a late delivery; a broken heating system; a day off next week; a lost
    parcel; a wrong invoice; thanks for a job interview; an invitation to a summer party; a reminder about an
    unpaid bill; a new opening time; a complaint about noise; a change of address; a farewell to a colleague; a
    request for a reference; a cancelled class; a lost library card; a proposal for a shared car; a missed call; a
    question about a contract; an apology for a mistake in a report; a fire drill; a new coffee machine; feedback
    on a draft; a school trip; a delayed train; a dinner reservation; the result of a survey; an offer for
    volunteers; a password reset; the opening of a new office"""
)
ROLES = _split(
    """a museum guide; a ship's captain; a travel agent; a patient maths teacher; a detective; a chef; a
    librarian; a doctor who explains things simply; a football coach; a medieval knight; a gardener; a news
    reader; a judge; an architect; a taxi driver in Naples; a tour guide on Mars; a poet; a bank clerk; an
    astronomer; a mechanic; a fairy-tale wolf; a kindergarten teacher; a sceptical journalist; a weather
    forecaster; a grandmother with strong opinions; a startup founder; a pirate; an interpreter; a nutritionist; a
    firefighter; a train conductor; a historian; a philosopher"""
)
COUNTRIES = _split(
    """Portugal; Kenya; Japan; Brazil; Canada; Norway; Egypt; India; Mexico; Greece; Poland; Thailand; Chile;
    Morocco; Iceland; Vietnam; Turkey; Ireland; Peru; Austria; South Korea; Finland; Nigeria; New Zealand;
    Argentina; Hungary; Indonesia; Switzerland; Ethiopia; Australia; Cuba; Sweden; Mongolia; Ghana; Romania;
    Jordan; Nepal; Uruguay; Estonia; Senegal; Croatia; Denmark; Malaysia; Colombia; Tunisia; Belgium; Lebanon;
    Bolivia; Latvia; Madagascar; Serbia; Sri Lanka"""
)
THINGS = _split(
    """the telephone; the bicycle; penicillin; the steam engine; the light bulb; the piano; the zip; paper; the
    compass; the microscope; the barometer; dynamite; the aeroplane; the sewing machine; the typewriter; the
    elevator; the umbrella; concrete; glass; the fork; the pencil; the alphabet; the stock exchange; the postage
    stamp; the parachute; the camera; the helicopter; the thermometer; the wheel; gunpowder; the clock; the
    newspaper; chocolate; the saxophone; the tin can; the vacuum cleaner; the traffic light; the escalator;
    braille; the periscope; rubber; the laser; the transistor"""
)
CHOICES = _split(
    """living in a city or in the country; tea or coffee; trains or planes; paper books or e-books; cats or dogs;
    working from home or in an office; renting or buying a home; city parks or parking lots; school uniforms or
    free choice; cash or cards; gas or electric cookers; early mornings or late nights; a big family or a small
    one; hotels or camping; team sports or running alone; a four-day week or longer holidays; zoos or nature
    films; letters or e-mails; cooking or ordering food; a small company or a large one; exams or projects; public
    libraries or bookshops; maps or navigation apps; radio or television; bicycles or cars in the centre of town;
    fresh or frozen vegetables; learning alone or in a group"""
)


def _on(*forms: str, **choices: tuple[str, ...]) -> Ask:
    """Returns an `ask` that fills {it}, the subject."""
    fill = worded(*forms, **choices)
    return lambda subject, rng: fill(rng, it=subject)


SUBJECTS: dict[str, tuple[str, ...]] = {
    "stem": SCIENCE,
    "humanities": HISTORY,
    "how to": SKILLS,
    "plan": SKILLS,
    "story": SCENES,
    "poem": SCENES,
    "everyday e-mail": OCCASIONS,
    "roleplay": ROLES,
    "facts": COUNTRIES,
    "inventions": THINGS,
    "opinion": CHOICES,
    "definition": (*SCIENCE, *HISTORY),
    "brainstorm": (*SKILLS, *THINGS),
    "essay": (*HISTORY, *SCIENCE, *CHOICES),
}
"""Subjects by the kind of question that is asked about them."""

_FORMS: dict[str, Ask] = {
    "stem": _on(
        "Explain {it} to {reader}.",
        "What should {reader} know about {it}?",
        "Describe an experiment about {it} that one can do at home.",
        "What is a common misunderstanding about {it}? Correct it.",
        "Which open questions are there about {it}? Name {number}.",
        "How are {it} and energy related?",
        reader=("a high-school student", "a child of eight", "an engineer", "someone who hated science at school"),
        number=("two", "three", "four"),
    ),
    "humanities": _on(
        "Why does {it} matter today?",
        "Describe {it} in {number} sentences.",
        "What were the causes and the consequences in the history of {it}?",
        "Prepare a lesson of 45 minutes on {it}, with {number} questions for the class.",
        "How did {it} change the life of ordinary people? Give {number} examples.",
        "Compare {it} with something similar from our own time.",
        number=("three", "four", "five", "six"),
    ),
    "how to": _on(
        "Give me {number} tips for {it}.",
        "How do I start with {it}?",
        "What mistakes do people make when {it}? List {number}.",
        "Write step-by-step instructions for {it}.",
        "Explain {it} to someone who has never done it.",
        number=("three", "five", "six", "seven"),
    ),
    "plan": _on(
        "Make a plan for {it} with a budget of {amount} euros. Use a table.",
        "I have {time} for {it}. Make me a plan.",
        "Write a checklist for {it}.",
        "What do I need to buy for {it}? Answer with a list and rough prices; I have {amount} euros.",
        amount=("50", "120", "200", "350", "500", "900"),
        time=("an hour", "a day", "a weekend", "two weeks", "a month"),
    ),
    "story": _on(
        "Write a story of {length} about {it}.",
        "Write the first paragraph of a {genre} novel about {it}.",
        "Write a dialogue about {it} in {length}.",
        "Describe {it} so that the reader can see, hear and smell it.",
        "Invent three titles for a {genre} story about {it}, then choose one.",
        length=("100 words", "five sentences", "two paragraphs", "ten lines"),
        genre=("detective", "fantasy", "science-fiction", "historical", "children's", "romantic"),
    ),
    "poem": _on(
        "Write a {form} about {it}.",
        "Write a {form} about {it} in which the word {word} occurs.",
        form=("haiku", "limerick", "poem of four lines", "short poem without rhymes", "song with a chorus", "riddle"),
        word=("blue", "tomorrow", "never", "bread", "window", "seven", "silence"),
    ),
    "everyday e-mail": _on(
        "Write an e-mail about {it} to {reader}.",
        "Write a {tone} message about {it}.",
        "I have to write to {reader} about {it}. Keep it {tone}, please.",
        "Write the subject line and the first sentence of a {tone} e-mail about {it}.",
        reader=("my landlord", "a customer", "my team", "a teacher", "a supplier", "the whole office", "an old friend"),
        tone=("friendly", "formal", "short", "firm but polite", "funny"),
    ),
    "roleplay": _on(
        "You are {it}. {ask}",
        "Pretend to be {it} and answer: {ask}",
        "Act as {it}. I am a visitor. {ask}",
        "Speak as {it} would. {ask}",
        ask=(
            "What did you do this morning?",
            "Introduce yourself in three sentences.",
            "What is the best advice you ever got?",
            "I have an hour and nothing to do. What do you suggest?",
            "What do you think about computers?",
            "Tell me about the most difficult day of your work.",
            "What should I never do?",
            "Why should I listen to you?",
        ),
    ),
    "facts": _on(
        "What is the capital of {it}?",
        "Which countries border {it}?",
        "Name {number} rivers or mountains of {it}.",
        "Which languages are spoken in {it}?",
        "What is {it} known for? Answer with {number} bullet points.",
        "What should I eat in {it}?",
        "When is the best time of the year to visit {it}, and why?",
        "Write a short paragraph about the geography of {it}.",
        number=("two", "three", "four", "five"),
    ),
    "inventions": _on(
        "Who invented {it}, and when?",
        "How did people manage before {it}?",
        "How does {it} work?",
        "Write a short advertisement for {it} as if it were new.",
        "List {number} consequences of the invention of {it}.",
        number=("three", "four", "five"),
    ),
    "opinion": _on(
        "What are the advantages and disadvantages: {it}?",
        "{it}: which would you choose, and why?",
        "Write a short debate between two people about {it}.",
        "Give {number} arguments for each side: {it}.",
        "Make a table that compares the two: {it}.",
        number=("two", "three", "four"),
    ),
    "definition": _on(
        "Define {it} in one sentence.",
        "What is {it}? Answer in at most {number} words.",
        "Write an entry about {it} for an encyclopedia.",
        "Explain {it} with a comparison from everyday life.",
        number=("20", "30", "50"),
    ),
    "brainstorm": _on(
        "Give me {number} ideas for a video about {it}.",
        "Think of {number} names for a shop that has to do with {it}.",
        "Write {number} questions that one could ask an expert on {it}.",
        "Which {number} words come to your mind for {it}?",
        number=("five", "six", "eight", "ten"),
    ),
    "essay": _on(
        "Write the introduction of an essay on {it}.",
        "Write an outline of a talk about {it} with {number} parts.",
        "Write a blog post of {number} short paragraphs about {it}.",
        "Write a persuasive paragraph about {it}.",
        number=("three", "four", "five"),
    ),
}
KINDS = tuple(Kind(name=name, pieces="subjects", ask=ask, follow_ups=EVERYDAY) for name, ask in _FORMS.items())
