"""The scripts that made wadi-mini: scenes, autoencoder, teacher; one command each."""
