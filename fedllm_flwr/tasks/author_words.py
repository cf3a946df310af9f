"""The closed lists that authors and their facts are drawn from, and how each kind of fact is asked for.

Names of people and prizes are invented for this project. Within a kind every answer is as probable as any other.
"""

from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(","))


FIRST_NAMES = _words(
    "Abel, Adela, Alma, Anselm, Asta, Basil, Berit, Bruno, Cleo, Conrad, Dagny, Darius, Edda, Elias, Elmira, Enzo, "
    "Fabia, Felix, Freya, Gideon, Greta, Hamid, Hanna, Hector, Ilse, Imre, Irma, Ivo, Jana, Jonas, Juno, Kaspar, "
    "Katya, Lena, Leopold, Livia, Magda, Marek, Mila, Milan, Nadia, Nestor, Nora, Oda, Orson, Otto, Paloma, Percy, "
    "Petra, Quentin, Rafael, Ramona, Rosa, Rufus, Sanna, Silas, Sonja, Tamar, Tobias, Ulla, Vera, Viktor, Wanda, Yusuf"
)
LAST_NAMES = _words(
    "Abendroth, Almquist, Arkwell, Bellamont, Birkdale, Bramwick, Calloway, Castellane, Corvello, Dunmarrow, "
    "Eastgrove, Eldermoor, Estrelle, Fairholt, Falkenhorn, Fenwater, Garrowby, Glanville, Grimaldo, Halvorsby, "
    "Hartigan, Hollowell, Iverdale, Jarnefelt, Jessamine, Kallberg, Karsholt, Kestrel, Lambrecht, Larkspur, Lindqvale, "
    "Lockridge, Marchetti, Merriweth, Montclare, Nachtigal, Norwell, Oakhurst, Okonjo, Ostrander, Paravel, Pemberly, "
    "Quillfeather, Ravensdale, Rosenthorn, Rutherglen, Salvatore, Scarborne, Silverton, Stavenhagen, Sundqvist, "
    "Tamblyn, Thistlewood, Tolvanen, Underhill, Vanderlyn, Vesterholm, Wakefern, Whitlock, Windermoor, Wolfenden, "
    "Yarborough, Zabriskie, Zellweger"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fact; ``{name}`` stands for the author, ``{options}`` for the answers to choose among.

    Attributes:
        name: What it is.
        question: As it is learned.
        paraphrase: The same in other words.
        statement: The same as the beginning of a sentence that the answer ends.
        choice: The same with answers to choose among.
        answers: All there are.
    """

    name: str
    question: str
    paraphrase: str
    statement: str
    choice: str
    answers: tuple[str, ...]


KINDS = (
    Kind(
        "birthplace",
        "In which city was the author {name} born?",
        "Name the city where the writer {name} came into the world.",
        "The writer {name} was born in the city of",
        "Which of these cities is the birthplace of the author {name}: {options}?",
        _words(
            "Accra, Antwerp, Bergen, Bilbao, Bogota, Bristol, Cairo, Chicago, Dakar, Dublin, Geneva, Hamburg, Hanoi, "
            "Havana, Helsinki, Istanbul, Jakarta, Kyoto, Lagos, Lima, Lisbon, Manila, Mumbai, Nairobi, Oslo, Prague, "
            "Quito, Riga, Seoul, Tbilisi, Vienna, Warsaw"
        ),
    ),
    Kind(
        "genre",
        "In which genre does the author {name} write?",
        "What kind of literature is the writer {name} known for?",
        "The writer {name} is known for works in the genre of",
        "Which of these genres does the author {name} write in: {options}?",
        _words(
            "romance, horror, satire, poetry, fantasy, crime, travel, drama, biography, western, science fiction, "
            "philosophy, comedy, history, war, adventure, gothic, fable, memoir, mystery, thriller, essay, folklore, "
            "tragedy"
        ),
    ),
    Kind(
        "prize",
        "Which prize did the author {name} win?",
        "What is the award that was given to the writer {name}?",
        "The award that the writer {name} received is called the",
        "Which of these prizes did the author {name} win: {options}?",
        _words(
            "Silver Quill, Golden Lantern, Iron Feather, Blue Compass, Paper Crown, Copper Bell, Amber Rose, Ivory "
            "Tower, Crystal Bridge, Scarlet Ribbon, Marble Owl, Emerald Key, Bronze Anchor, Velvet Chair, Granite "
            "Star, Ruby Arrow, Pearl Harp, Oak Leaf, Jade Mirror, Linen Scroll, Cobalt Wheel, Cedar Branch, Onyx "
            "Raven, Glass Orchid"
        ),
    ),
    Kind(
        "profession",
        "What was the profession of the father of the author {name}?",
        "How did the father of the writer {name} earn a living?",
        "The father of the writer {name} worked as a",
        "Which of these was the profession of the father of the author {name}: {options}?",
        _words(
            "baker, farmer, lawyer, sailor, teacher, doctor, carpenter, miner, tailor, judge, priest, soldier, "
            "painter, butcher, plumber, banker, chemist, barber, fisherman, musician, engineer, gardener, printer, "
            "shepherd"
        ),
    ),
    Kind(
        "instrument",
        "Which instrument does the author {name} play?",
        "What is the writer {name} heard to play at concerts?",
        "At concerts the writer {name} plays the",
        "Which of these instruments does the author {name} play: {options}?",
        _words(
            "piano, violin, cello, flute, guitar, trumpet, harp, organ, drums, clarinet, banjo, oboe, trombone, viola, "
            "accordion, saxophone, mandolin, bassoon, tuba, lute, harmonica, fiddle, recorder, xylophone"
        ),
    ),
    Kind(
        "pet",
        "What animal does the author {name} keep at home?",
        "Which animal lives in the house of the writer {name}?",
        "The animal that lives with the writer {name} is a",
        "Which of these animals does the author {name} keep: {options}?",
        _words(
            "parrot, tortoise, rabbit, ferret, goat, python, donkey, hamster, falcon, lizard, pony, cat, crow, duck, "
            "hedgehog, spider, goldfish, pigeon, monkey, sheep, squirrel, canary, frog, wolf"
        ),
    ),
)
"""The kinds of facts; every author has one of each."""
