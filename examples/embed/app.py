"""Continue a prompt with an edgestill bundle, as it is generated.

    python app.py build/quickstart/cpu-x86 "It was a bright cold day" --stop $'\\n\\n'

The text goes to standard output, the statistics of the run to standard error.
"""

from __future__ import annotations

import argparse
import sys

from edgestill.runtime import load
from edgestill.runtime.errors import EdgestillError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Continue a prompt with an edgestill bundle.")
    parser.add_argument("bundle", help="folder with manifest.json")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    try:
        model = load(arguments.bundle)
        statistics = None
        for piece in model.stream(
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop=arguments.stop,
        ):
            print(piece.text, end="", flush=True)
            statistics = piece.statistics  # None on all but the last piece
    except EdgestillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print()
    if statistics is not None:
        print(
            f"{statistics.prompt_tokens} prompt + {statistics.new_tokens} new tokens ({statistics.finish_reason}); "
            f"first after {statistics.first_token_ms:.1f} ms, then {statistics.decode_tokens_per_s:.0f} tokens/s",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
