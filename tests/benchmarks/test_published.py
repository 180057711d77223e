"""What the benchmark of published models rests on: sequences, splits, changes."""

import dataclasses
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks.detection.published import antibodies, foreign_sets, models, sequences
from benchmarks.detection.published.foreign_sets import Given, Split

HEAVY = (
    "VQLVQSGAEVKKPGSSVKVSCKASGGTFSSYAISWVRQAPGQGLEWMGGIIPIFQKFQGRVTITADESTSTAYMELSSLRSEDTAVYYC"
    "ARYDGIYGELDFWGQGTLVTVSS"
)
LOOP = "ARYDGIYGELDF"


def pools() -> list[str]:
    return antibodies.made_up()["natural human IGHV"]


def test_the_third_loop_and_the_tail_of_a_heavy_chain_are_found() -> None:
    assert sequences.loop(HEAVY) == LOOP
    assert sequences.tail(HEAVY) == HEAVY[HEAVY.index(LOOP) :]


def test_genes_are_translated_by_the_standard_code() -> None:
    assert sequences.translated("ATGGCCTGGTAANNNGAC") == "MAW*XD"


def test_clones_have_loops_of_one_length_that_are_alike() -> None:
    near = HEAVY.replace("GIYG", "GIYA")
    far = HEAVY.replace(LOOP, "WWWWWWWWWWWF")
    one, same, other = sequences.clones([HEAVY, near, far])
    assert one == same != other


def test_no_clone_is_in_two_parts_of_a_split() -> None:
    known = pools()
    owner = np.array(sequences.clones([*known, *known]))  # each twice, so that clones have several
    for split in foreign_sets.splits([*known, *known]):
        parts = [set(owner[part]) for part in (split.fit, split.calibration, split.test)]
        assert sum(map(len, parts)) == len(set(owner))
        every = np.concatenate([split.fit, split.calibration, split.test])
        assert sorted(every) == list(range(2 * len(known)))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_mutation_changes_so_many_residues(count: int) -> None:
    found = foreign_sets.mutated(count)(HEAVY, np.random.default_rng(0))
    assert sum(a != b for a, b in zip(HEAVY, found, strict=True)) == count


def test_changes_in_order_keep_the_residues() -> None:
    generator = np.random.default_rng(0)
    for change in (foreign_sets.swapped, foreign_sets.shuffled):
        found = change(HEAVY, generator)
        assert found != HEAVY
        assert sorted(found) == sorted(HEAVY)


def test_a_changed_sequence_is_shown_beside_the_split_that_tests_its_parent() -> None:
    assert list(Given(["A", "B", "C"], [5, 6, 7]).of({6, 7})) == [1, 2]
    assert list(Given(["A", "B"], []).of({6})) == [0, 1]


def test_near_copies_of_what_fits_are_left_out() -> None:
    copies = {"known": np.array([[1.0, 0.1, 0.2], [0.1, 1.0, 0.9], [0.2, 0.9, 1.0]])}
    split = Split(np.array([2]), np.array([0]), np.array([0, 1]))
    assert list(antibodies.kept(split.test, "known", split, copies)) == [0]
    assert list(antibodies.kept(split.test, "known", split, None)) == [0, 1]


def test_tokens_are_those_of_the_vocabulary_with_prompt_and_end() -> None:
    language = models.tiny()
    [long, short] = language.tokens(["ACD", "A"])
    names = {i: word for word, i in language.vocabulary.items()}
    assert [names[i] for i in long.tolist()] == ["[HEAVY]", "[HUMAN]", "A", "C", "D", "[SEP]"]
    assert [names[i] for i in short.tolist()] == [
        *("[HEAVY]", "[HUMAN]", "A", "[SEP]", "[PAD]", "[PAD]")
    ]


def test_generated_sequences_are_the_models_own_and_repeat() -> None:
    language = models.tiny()
    found = language.generated(3, 1.0, seed=0)
    assert found == language.generated(3, 1.0, seed=0) != language.generated(3, 1.0, seed=1)
    assert all(set(each) <= set(sequences.RESIDUES) for each in found)


def test_the_sets_of_larger_models_are_among_those_of_all() -> None:
    pools = antibodies.made_up()
    case = antibodies.Case("tiny", models.tiny, sizes=antibodies.Sizes(real=1, changed=1))
    every = foreign_sets.real(pools, "human", 1)
    every |= foreign_sets.changed(pools, pools["natural human IGHV"], "human", 1)
    generated = {f"generated at {temperature:g}" for temperature in antibodies.TEMPERATURES}
    assert set(foreign_sets.FEW) <= set(every) | generated
    few = dataclasses.replace(case, every=False)
    assert [name for name in every if few.takes(name)] == [
        name for name in every if name in foreign_sets.FEW
    ]


def test_rows_of_models_that_are_not_measured_again_stay(tmp_path: Path) -> None:
    file, case = tmp_path / "report.json", antibodies.Case("tiny", models.tiny)
    assert antibodies.others(file, (case,)) == []
    file.write_text('{"rows": [{"model": "tiny"}, {"model": "other"}]}')
    assert antibodies.others(file, (case,)) == [{"model": "other"}]


def archive(folder: Path, name: str, files: Mapping[str, str]) -> None:
    with tarfile.open(folder / f"{name}-1.0.tar.gz", "w:gz") as tar:
        for path, words in files.items():
            member = tarfile.TarInfo(f"{name}-1.0/{path}")
            member.size = len(words.encode())
            tar.addfile(member, io.BytesIO(words.encode()))


def test_sequences_are_read_out_of_an_archive(tmp_path: Path) -> None:
    archive(tmp_path, "abstar", {"test_data/test_1k.fasta": ">a\nATGGCC\nTGG\n>b\nTAA\n"})
    opened = sequences.opened(tmp_path, "abstar")
    assert list(sequences.of_abstar(opened, "test_1k")) == ["ATGGCCTGG", "TAA"]
    with pytest.raises(FileNotFoundError, match=r"antpack-\*\.tar\.gz"):
        sequences.opened(tmp_path, "antpack")
