"""Prints 160 small chats, a line of JSON each: something of one's own to finetune on (docs/finetuning.md).

python examples/household_chats.py > my_chats.jsonl
"""

import json

THINGS = ("kettle", "lamp", "ladder", "window", "copper pan", "oak table", "bicycle", "compass", "clock", "loom")
CARE = (
    ("look after", "Keep the {thing} dry, check it every {days} days and write down what you see."),
    ("clean", "Wipe the {thing} with a soft cloth, wait {days} minutes and wipe it again."),
    ("mend", "Take the {thing} apart on a white sheet, and give yourself {days} evenings."),
    ("store", "Wrap the {thing} in paper and look at it again in {days} weeks."),
)


def main() -> None:
    for number in range(160):
        thing, (verb, answer) = THINGS[number % 10], CARE[number % 4]
        turns = [
            {"role": "user", "content": f"How do I {verb} my {thing}?"},
            {"role": "assistant", "content": answer.format(thing=thing, days=2 + number // 20)},
        ]
        print(json.dumps({"messages": turns, "id": str(number)}))


if __name__ == "__main__":
    main()
