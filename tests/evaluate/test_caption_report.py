"""The score table as text."""

from fastidc.evaluate.report import format_table

SCORES = {
    "BLEU-1": 0.5,
    "BLEU-2": 0.4,
    "BLEU-3": 0.3,
    "BLEU-4": 0.2,
    "METEOR": None,
    "ROUGE-L": 0.71234,
    "CIDEr": 1.50755,
    "pairs": 7970,
    "tokenizer": "ptb-regex",
    "METEOR_reason": "there is no java",
    "tokenizer_reason": "there is no java",
}
METRICS = {"overall": SCORES, "change": SCORES, "no_change": SCORES, "types": {"color": SCORES, "move": SCORES}, "change accuracy": 0.98765}


def test_the_table_is_aligned_and_says_what_is_missing():
    lines = format_table(METRICS, constant=("there is no change", {"overall": SCORES, "types": {"move": SCORES}})).splitlines()
    table = lines[:7]
    assert len({len(line) for line in table}) == 1
    assert [line.split("  ")[0].strip() or line.split()[0] for line in table[2:]] == ["overall", "change", "no change", "color", "move"]
    assert table[0].split()[-9:] == ["pairs", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr", "constant"]
    assert table[2].split()[1:] == ["7970", "50.00", "40.00", "30.00", "20.00", "-", "71.23", "150.75", "150.75"]
    assert table[3].split()[-1] == "-"
    assert max(map(len, table)) <= 100
    text = "\n".join(lines[7:])
    assert "change accuracy  0.9877" in text
    assert "METEOR -: there is no java" in text
    assert text.count("there is no java") == 2
    assert '"there is no change"' in text


def test_one_set_of_scores_makes_a_table_of_one_row():
    lines = format_table(SCORES).splitlines()
    assert lines[2].split()[:2] == ["overall", "7970"]
    assert "METEOR -" in lines[-2]
    assert format_table({"change accuracy": 0.5}) == "change accuracy  0.5000"
