"""N-grams of a growing text, against a search through all of it."""

from effc.compiler.runtimes.ngrams import NgramIndex
from hypothesis import given
from hypothesis import strategies as st

texts = st.lists(st.integers(0, 3), max_size=17)  # no n-gram has more earlier positions than are compared


def best_by_search(ids: list[int], longest: int) -> tuple[int, int]:
    best = (0, 0)
    for length in range(1, longest + 1):
        ends = [end for end in range(length, len(ids)) if ids[end - length : end] == ids[len(ids) - length :]]
        best = (ends[-1], length) if ends else best
    return best


@given(texts, st.integers(1, 5))
def test_the_longest_match_is_the_latest_one_that_a_search_gives(ids, longest):
    assert NgramIndex(ids, longest).longest_match() == best_by_search(ids, longest)


@given(texts)
def test_a_text_that_grew_token_by_token_is_indexed_as_one_that_was_there_whole(ids):
    grown: list[int] = []
    index = NgramIndex(grown)
    for token in ids:
        grown.append(token)
        match = index.longest_match()
    assert not ids or match == NgramIndex(ids).longest_match()


def test_a_continuation_goes_on_as_the_text_did_and_repeats_what_the_text_repeats():
    ids = [1, 2, 3, 4, 5, 1, 2]
    index = NgramIndex(ids)
    position, length = index.longest_match()
    assert (position, length) == (2, 2) and index.continuation(position, 3) == [3, 4, 5]
    loop = NgramIndex([9, 7, 8, 7, 8])
    position, length = loop.longest_match()
    assert (position, length) == (3, 2) and loop.continuation(position, 5) == [7, 8, 7, 8, 7]


def test_a_pair_that_is_everywhere_is_compared_a_bounded_number_of_times():
    ids = [5, 6, 7] + [6, 7] * 100  # the only longer n-gram is older than all that are compared
    ids += [5, 6, 7]
    assert NgramIndex(ids, longest=3).longest_match()[1] == 2
