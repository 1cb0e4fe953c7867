#!/bin/sh
# What `make demo` runs: a real picture to tokens and back, and a picture from words, with MLX, by the
# commands a user would type.
set -eu
BIN="${BIN:-.venv/bin}"
OUT=demo-out
PICTURE=docs/images/chelsea.jpg
mkdir -p "$OUT"

say() {
  printf '\n$ qlip'
  for word; do case $word in *' '*) printf ' "%s"' "$word" ;; *) printf ' %s' "$word" ;; esac; done
  printf '\n'
  "$BIN/qlip" "$@"
}

say encode "$PICTURE" --backend mlx -o "$OUT/chelsea.qlip" --force
say info "$OUT/chelsea.qlip"
say decode "$OUT/chelsea.qlip" --backend mlx -o "$OUT/chelsea.png" --force
say reconstruct "$PICTURE" --backend mlx -o "$OUT/chelsea-both.png" --force --show
# The model that ships was trained on emoji scenes alone: this is what it is good at.
say reconstruct docs/images/emoji --backend mlx -o "$OUT/emoji-both.png" --force
say classify docs/images/emoji/cat.png --labels "a cat,a dog,a car,a house" --backend mlx
say generate "a cat" --seed 0 --backend mlx -o "$OUT/a-cat.png" --force
printf '\nInput beside output: %s and %s; drawn: %s\n' "$OUT/chelsea-both.png" "$OUT/emoji-both.png" "$OUT/a-cat.png"
