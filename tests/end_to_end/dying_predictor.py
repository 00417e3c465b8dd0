"""``predict_difference`` that dies inside a write as ``dying_scorer.py`` does."""

from dying_scorer import die_while

if __name__ == "__main__":
    die_while("predict_difference")
