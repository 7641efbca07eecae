#!/bin/sh
# Makes speech.flac from speech.txt with Debian's flite (voice slt) and flac:
#   apt-get install flite flac
# A tenth slower than flite speaks by itself: it fills a 30 s window of Whisper, and tiny.en hears it better.
set -eu
cd "$(dirname "$0")"
flite -voice slt --setf duration_stretch=1.1 -f speech.txt -o speech.wav
flac --silent --force --best --no-padding --delete-input-file -o speech.flac speech.wav
