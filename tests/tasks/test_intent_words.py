from fedllm_flwr.tasks.intent_words import FILLERS


def test_every_language_has_the_same_number_of_words_for_each_slot():
    counts = {
        language: {slot: len(words) for slot, words in slots.items()}
        for language, slots in FILLERS.items()
    }
    assert set(FILLERS) == {"en", "de", "fr", "es", "it", "nl", "pl", "ar"}
    assert all(count == counts["en"] for count in counts.values())


def test_words_are_clean_and_differ_within_a_slot():
    for slots in FILLERS.values():
        for words in slots.values():
            assert len(set(words)) == len(words)
            assert all(word == " ".join(word.split()) != "" for word in words)
