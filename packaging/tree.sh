#!/bin/sh
# tree.sh PROGRAM DIR: lays out what is installed: the program, its manual pages and its completions,
# which the program writes itself.
set -eu
program=$1 dir=$2
share=$dir/share
mkdir -p "$dir/bin" "$share/man/man1" "$share/bash-completion/completions" \
    "$share/zsh/site-functions" "$share/fish/vendor_completions.d"
cp -- "$program" "$dir/bin/doppler-node"
chmod 755 "$dir/bin/doppler-node"
# The user's settings have no say here.
DOPPLER_CONFIG=''
export DOPPLER_CONFIG
"$program" man "$share/man/man1"
"$program" completions bash >"$share/bash-completion/completions/doppler-node"
"$program" completions zsh >"$share/zsh/site-functions/_doppler-node"
"$program" completions fish >"$share/fish/vendor_completions.d/doppler-node.fish"
