"""Operations on tensors: a slow specification (`naive.py`) and faster implementations tested against it."""
