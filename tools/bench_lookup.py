#!/usr/bin/env python3
"""What prompt lookup gains where an answer repeats its prompt, and loses where it does not.

    python tools/bench_lookup.py                     SmolLM2, up to 7 guesses
    python tools/bench_lookup.py -m MODEL --prompt-lookup 15 -n 256

Each task is answered in turn without and with lookup, in one process, greedily; the texts are compared. The
table has the medians of decoding (prompts are not counted) and the share of guesses that were right.
"""

import argparse
import platform
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path

import edgeq
from edgeq import catalog
from edgeq.cli.bench import cpu
from edgeq.generate import lookup

POEM = """The wind blew over the hill and under the bridge, and the miller said to his daughter: close the
gate, for the wind that blew over the hill and under the bridge last year took the roof of the mill and the
hat of the miller, and neither the roof of the mill nor the hat of the miller was ever seen again."""
CODE = Path(lookup.__file__).read_text(encoding="utf-8").partition("class Lookup")[2][:1500]
# What stands here goes on without a chat template, so that models of any size do what the task says.
TASKS = {
    "repeat a text": f"{POEM}\n\nOnce more, the same:\n\n{POEM}\n\nOnce more, the same:\n\n",
    "edit code": f"# before\nclass Lookup{CODE}\n\n# after renaming `text` to `words`\nclass Lookup",
    "a table": "| n | n * n | n * n * n |\n|---|---|---|\n| 1 | 1 | 1 |\n| 2 | 4 | 8 |\n| 3 | 9 | 27 |\n",
    "a story": "Once upon a time, in a town by the sea, an old clockmaker found a letter. It said:",
    "an essay": "Why do people travel? There are many answers, and the first that comes to mind is",
}


def main() -> None:
    """Measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smollm2")
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-n", "--predict", type=int, default=192)
    parser.add_argument("-r", "--rounds", type=int, default=3, help="times that the two take turns")
    parser.add_argument("--prompt-lookup", type=int, default=7)
    parser.add_argument("--temp", type=float, default=0)
    given = parser.parse_args()
    path = catalog.resolve(given.model)
    rows = []
    with edgeq.load(path, threads=given.threads, ctx=2048) as llm:
        for task, prompt in TASKS.items():
            print(f"{task} ...", file=sys.stderr, flush=True)
            llm.generate(prompt, max_tokens=4)  # the prompt is in the cache from here on
            rates: dict[int, list[float]] = {0: [], given.prompt_lookup: []}
            texts = set()
            for _ in range(given.rounds):
                for guesses, samples in rates.items():
                    options = {"temperature": given.temp, "seed": 1, "max_tokens": given.predict}
                    texts.add(llm.generate(prompt, prompt_lookup=guesses, **options))
                    t = llm.timings
                    samples.append((t.predicted_n - 1) / t.predicted_ms * 1000)
            plain, guessed = (statistics.median(samples) for samples in rates.values())
            right = f"{t.draft_n_accepted / t.draft_n:.0%} of {t.draft_n}" if t.draft_n else "none made"
            same = "yes" if len(texts) == 1 else "no"
            rows.append(
                f"| {task} | {t.predicted_n} | {plain:.1f} | {guessed:.1f} | {guessed / plain:.2f} "
                f"| {right} | {same} |"
            )
        print(
            f"{path.name}, up to {given.prompt_lookup} guesses, {cpu()}, {llm.threads} threads, "
            f"edgeq {edgeq.__version__}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}; "
            "tokens per second\n"
        )
    print("| task | tokens | without | with | ratio | right guesses | same text |")
    print("|---|---:|---:|---:|---:|---:|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
