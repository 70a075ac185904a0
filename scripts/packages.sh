# SPDX-License-Identifier: GPL-2.0-or-later
# Shared by the bash scripts beside it that make Debian packages, after common.sh, and after sources.sh for
# the version of the host's.
# shellcheck shell=bash

# shellcheck disable=SC2034 # for the scripts that read these
VERSION=$(cat "$REPO/VERSION") RELEASE=$REPO/out/release

# changelog_entry SOURCE VERSION SUITE TEXT: an entry of debian/changelog. Dated as the last commit, so
# that the same sources make the same package.
changelog_entry() {
    local date
    date=$(git -C "$REPO" log -1 --format=%cD 2>/dev/null || date -R -r "$REPO/VERSION")
    printf '%s (%s) %s; urgency=medium\n\n' "$1" "$2" "$3"
    fold -s -w 74 <<<"$4" | sed '1s/^/  * /; 2,$s/^/    /; s/ *$//'
    printf '\n -- %s  %s\n' "$(sed -n 's/^Maintainer: //p' "$REPO/packaging/guest/debian/control")" "$date"
}

# host_version: the version of Debian's QEMU with our series in it.
host_version() {
    echo "$(dpkg-parsechangelog -l "$(source_dir qemu)/debian/changelog" -S Version)+fph$VERSION"
}

# build_package TREE all|binary DEB: what dpkg-buildpackage makes of TREE, into $RELEASE. Its log is beside
# TREE's directory.
build_package() {
    say "building $3"
    quietly "$(dirname "$(dirname "$1")")/log" dpkg-buildpackage env -C "$1" dpkg-buildpackage "--build=$2" --no-sign
    mkdir -p "$RELEASE"
    mv "$1/../$3" "$RELEASE/$3"
}
