"""Real antibody sequences, out of source distributions of antpack, abstar and biopython.

They are read from the archives as `pip download` brings them and are never stored elsewhere.
Species is told by the nearest germline V gene of abstar's, human or mouse; where neither is near it
is "neither".
"""

import csv
import gzip
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

#: Residues, as vocabularies of antibody models have them.
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"

#: Of the genetic code in the order TCAG of each base.
_CODE = "FFLLSSSSYY**CC*WLLLLPPPPHHQQRRRRIIIMTTTTNNKKSSRRVVVVAAAADDEEGGGG"
_CODONS = {
    a + b + c: _CODE[16 * i + 4 * j + k]
    for i, a in enumerate("TCAG")
    for j, b in enumerate("TCAG")
    for k, c in enumerate("TCAG")
}

#: A V gene is a sequence's own if it holds so much of the gene's 4-mers, so much more than those of
#: the other species.
NEAR, MARGIN = 0.45, 0.05

#: Residues of a variable domain, and where a heavy chain's third loop is in it.
LENGTHS = range(80, 150)
_LOOP = re.compile(r"C([A-Z]{3,35}?)[WF]G.G")
_TAIL = re.compile(r"(?<=C)[A-Z]{3,35}?WG.G[A-Z]{0,7}$")

Pools = dict[str, list[str]]


def read(folder: Path) -> Pools:
    """Different sequences by what they are, in the order of their files.

    Raises:
        FileNotFoundError: An archive is missing.
    """
    antpack, abstar = opened(folder, "antpack"), opened(folder, "abstar")
    germlines = {
        species: [
            (name, translated(gene))
            for part in parts
            for name, gene in fasta(text(abstar, f"germline_dbs/bcr/{part}/ungapped/v.fasta"))
        ]
        for species, parts in GERMLINES.items()
    }
    known = Species({name: germlines[name] for name in ("human", "mouse")})
    pools: Pools = {}
    for source, sequence in dict.fromkeys(of_antpack(antpack)):
        species, chain = known.of(sequence)
        pools.setdefault(f"{source} {species} {chain}", []).append(sequence)
    pools["reads"] = [cut for cut in map(frame, of_abstar(abstar, "test_1k")) if cut]
    pools["neutralising"] = [c for c in map(frame, of_abstar(abstar, "test_hiv_bnab_hcs")) if c]
    for species, genes in germlines.items():
        pools[f"{species} V genes"] = [gene for name, gene in genes if name.startswith("IGHV")]
    pools["proteins"] = list(windows(proteins(opened(folder, "biopython"))))
    return {name: usable(found) for name, found in pools.items()}


GERMLINES = {"human": ["human"], "mouse": ["balbc", "c57bl6"], "macaque": ["macaque"]}


def opened(folder: Path, package: str) -> tarfile.TarFile:
    found = sorted(folder.glob(f"{package}-*.tar.gz"))
    if not found:
        raise FileNotFoundError(
            f"Expected {package}-*.tar.gz in {folder}, got none. `make published` brings it."
        )
    return tarfile.open(found[-1])


def text(archive: tarfile.TarFile, ending: str) -> str:
    """A file of an archive, unpacked if its name says so."""
    [member] = [it for it in archive.getmembers() if it.name.endswith(ending)]
    found = archive.extractfile(member)
    assert found is not None
    data = found.read()
    return (gzip.decompress(data) if ending.endswith(".gz") else data).decode()


def fasta(words: str) -> Iterator[tuple[str, str]]:
    for record in words.split(">")[1:]:
        name, *lines = record.splitlines()
        yield name, "".join(lines).upper()


def translated(gene: str) -> str:
    return "".join(_CODONS.get(gene[i : i + 3], "X") for i in range(0, len(gene) - 2, 3))


def usable(sequences: Iterable[str]) -> list[str]:
    """Each once, of known residues and of a domain's length."""
    return [
        each
        for each in dict.fromkeys(sequences)
        if len(each) in LENGTHS and set(each) <= set(RESIDUES)
    ]


def of_antpack(archive: tarfile.TarFile) -> Iterator[tuple[str, str]]:
    """Chains as sequenced, paired mouse chains, therapeutic antibodies, and T-cell receptors."""
    for file, columns, source in (
        ("test_data/test_data.csv.gz", ["sequence"], "natural"),
        ("test_data/imgt_comp_scoring.csv.gz", ["sequences"], "natural"),
        (
            "test_data/dna_translate_test_data.csv.gz",
            ["sequence_alignment_aa_heavy", "sequence_alignment_aa_light"],
            "paired",
        ),
        ("test_data/tcr_test_data.csv.gz", ["sequence"], "receptor"),
    ):
        for row in csv.DictReader(text(archive, f"/{file}").splitlines()):
            yield from ((source, row[column]) for column in columns)
    for _, sequence in fasta(text(archive, "/test_data/addtnl_test_data.fasta.gz")):
        yield "therapeutic", variable(sequence)


def variable(chain: str) -> str:
    """The variable domain of a whole chain."""
    found = re.match(r"[A-Z]{80,130}?(?:VSS|VSA|EIK|DIK|ELK|TVL)", chain)
    return found[0] if found else ""


def of_abstar(archive: tarfile.TarFile, name: str) -> Iterator[str]:
    for _, gene in fasta(text(archive, f"/test_data/{name}.fasta")):
        yield gene


def frame(gene: str) -> str:
    """The longest open frame with a heavy chain's third loop, or nothing."""
    frames = (part for i in range(3) for part in translated(gene[i:]).split("*"))
    found = max((f for f in frames if re.search(r"Y[YFH]C.{3,35}W", f)), key=len, default="")
    return re.sub(r"(?<=TVSS).*$", "", found)


def proteins(archive: tarfile.TarFile) -> Iterator[str]:
    """Translations of a chloroplast and of a plasmid, of no antibody."""
    for name in ("NC_000932.gb", "NC_005816.gb"):
        for found in re.findall(r'/translation="([A-Z\s]+)"', text(archive, f"/GenBank/{name}")):
            yield re.sub(r"\s", "", found)


def windows(whole: Iterable[str], length: int = 120) -> Iterator[str]:
    for protein in whole:
        for start in range(0, len(protein) - length + 1, length):
            yield protein[start : start + length]


def words_of(sequence: str, length: int = 3) -> frozenset[str]:
    return frozenset(sequence[i : i + length] for i in range(len(sequence) - length + 1))


class Species:
    """Tells species and chain by V genes."""

    def __init__(self, germlines: dict[str, list[tuple[str, str]]]) -> None:
        self._genes: dict[tuple[str, str], list[frozenset[str]]] = {}
        for species, genes in germlines.items():
            for name, gene in genes:
                if "*" not in gene and len(gene) >= LENGTHS.start:
                    self._genes.setdefault((species, name[:4]), []).append(words_of(gene, 4))

    def of(self, sequence: str) -> tuple[str, str]:
        words = words_of(sequence, 4)
        found = {
            key: max(len(words & gene) / len(gene) for gene in genes)
            for key, genes in self._genes.items()
        }
        (species, chain), value = max(found.items(), key=lambda item: item[1])
        other = max(share for key, share in found.items() if key[0] != species)
        is_near = value >= NEAR and value - other >= MARGIN
        return species if is_near else "neither", chain


def loop(sequence: str) -> str:
    """A heavy chain's third loop, by which clones differ; all of it where none is found."""
    found = _LOOP.findall(sequence[80:])
    return found[-1] if found else sequence


def tail(sequence: str) -> str | None:
    """From that loop to the end: what a V gene does not give."""
    found = _TAIL.search(sequence)
    return found[0] if found else None


def clones(sequences: list[str]) -> list[int]:
    """Which belong together: loops of one length that are alike in four of five residues."""
    owner, seen = list(range(len(sequences))), [loop(each) for each in sequences]
    for i, own in enumerate(seen):
        for j in range(i):
            other = seen[j]
            if len(own) == len(other) and alike(own, other) >= 0.8:
                old, new = owner[i], owner[j]
                owner = [new if it == old else it for it in owner]
    return owner


def alike(one: str, other: str) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)
