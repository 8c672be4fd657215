"""The stages of a round, one file each; `engines/`, `trainer/` and `losses/` hold the heavy parts."""
