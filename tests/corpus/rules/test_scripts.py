"""Scripts of letters and forms of Chinese characters."""

from megatrain.corpus.letters import code_points
from megatrain.corpus.rules.scripts import NAMES, Forms, counts, forms


def test_letters_are_counted_by_script() -> None:
    found = dict(zip(NAMES, counts(code_points("abc é Ж の ガ 字〇𠀀 한 ก 1, \U0010fffd")).tolist(), strict=True))
    assert {name: number for name, number in found.items() if number and name != "other"} == {
        **{"Latin": 4, "Cyrillic": 1, "Kana": 2, "Han": 3, "Hangul": 1, "Thai": 1}
    }


def test_forms_of_characters() -> None:
    assert forms(code_points("们这电")) == Forms(simplified=3, traditional=0, japanese=0, chinese=3)
    assert forms(code_points("這電關您")) == Forms(simplified=0, traditional=3, japanese=0, chinese=1)
    assert forms(code_points("広働込")) == Forms(simplified=0, traditional=0, japanese=3, chinese=0)
    assert forms(code_points("天人 abc か")) == Forms(simplified=0, traditional=0, japanese=0, chinese=0)
