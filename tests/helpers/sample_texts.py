"""Texts that several test files embed or mine."""

EDGE_CASES = [
    "a",
    "the boiler drips and hisses all night long",
    "",
    "bike " * 90,
    "the boiler drips",
    "été 🚲 <eos> [SEP]",
]
SENTENCES = [
    "a kidney stone is a hard piece of material that forms in the kidney",
    "the cat sat on the mat",
    "which animal did sit there",
    "hard material forms on the mat",
    "a stone for the animal",
    "the kidney of the cat",
    "a piece of the mat",
    "how is it treated",
]
