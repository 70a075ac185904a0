# SPDX-License-Identifier: GPL-2.0-or-later
# Shared by the bash scripts beside it, after common.sh: an apt that knows other suites of Debian than
# this machine's, without a change to the machine's own. Needs no root.
# shellcheck shell=bash

# suite_entry SUITE|SUITE=src: a line for sources.list, of packages or of sources. The mirror is the one of
# bookworm, or of its security updates.
suite_entry() {
    local mine=bookworm archive type=deb
    [[ $1 != *-security ]] || mine=bookworm-security
    [[ $1 != *=src ]] || type=deb-src
    archive=$(mirror_of $mine Packages) || die "apt has no entry for $mine main: add Debian's own to /etc/apt first"
    echo "$type [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive ${1%=src} main"
}

# use_suites [--fresh] SUITE|SUITE=src...: from here on, apt-get and apt-cache of this script know these suites
# only. Their lists, in $FPH_CACHE/apt, are read again when they are a day old, or if they are to be fresh.
use_suites() {
    local dir names suite fresh=no
    [ "$1" != --fresh ] || { fresh=yes && shift; }
    names=$(printf '%s\n' "${@%=src}" | sort -u | xargs)
    dir=$FPH_CACHE/apt/$(IFS=+ && echo "$*")
    need_disk "$dir" 200 "the lists of $names"
    mkdir -p "$dir"/{lists,archives,etc,state}
    for suite; do suite_entry "$suite"; done >"$dir/sources"
    cat >"$dir/conf" <<EOF
Dir::State "$dir/state";
Dir::State::lists "$dir/lists";
Dir::State::status "/dev/null";
Dir::Cache "$dir";
Dir::Cache::archives "$dir/archives";
Dir::Etc::sourcelist "$dir/sources";
Dir::Etc::sourceparts "$dir/etc";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "$dir/etc";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Sandbox::User "root";
EOF
    export APT_CONFIG=$dir/conf
    if [ $fresh = yes ] || [ -z "$(find "$dir/read" -mtime -1 2>/dev/null)" ]; then
        say "reading the lists of $names"
        apt-get -q -o APT::Update::Error-Mode=any update >"$dir/log" 2>&1 ||
            die "cannot read the package lists of $names, is the network there?" \
                "$(grep -m 1 '^[EW]: ' "$dir/log"). Log: $dir/log"
        touch "$dir/read"
    fi
}

# install_debian SUITE PACKAGES ROOT LOG SUITES...: a minimal Debian with PACKAGES (a,b,c) from SUITES in the
# directory ROOT. Shows mmdebstrap's steps, logs the rest.
install_debian() {
    local suite=$1 packages=$2 root=$3 log=$4 name
    shift 4
    say "installing Debian $suite; log in $log"
    for name; do suite_entry "$name"; done >"$log.sources"
    mmdebstrap --mode=root --variant=minbase --include="$packages" \
        --aptopt='Acquire::Retries "2"' --aptopt='Acquire::http::Timeout "20"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' "$suite" "$root" - <"$log.sources" 2>&1 |
        tee "$log" | { grep --line-buffered '^[IE]: ' || true; } ||
        die "mmdebstrap failed (no network? a package that is gone?); its messages are in $log"
}

# fill_pool DIR ROOT LOG PACKAGE...: an archive for apt in DIR, with packages from the suites of use_suites, and
# what they need beside what is in ROOT. No other archive than that is left to ROOT.
fill_pool() {
    local pool=$1 root=$2 log=$3
    shift 3
    mkdir -p "$pool/partial"
    apt-get -q -y --download-only --no-install-recommends -o Dir::Cache::archives="$pool" \
        -o Dir::State::status="$root/var/lib/dpkg/status" install "$@" >>"$log" 2>&1 ||
        die "apt-get failed: $(grep '^E: ' "$log" | head -n 3 | paste -sd';'). Log: $log"
    rm -rf "$pool/partial" "$pool/lock" "$root"/var/lib/apt/lists/*
    rm -f "$root/etc/apt/sources.list" "$root"/etc/apt/sources.list.d/*
    (cd "$pool" && dpkg-scanpackages -m . >Packages 2>>"$log") || die "dpkg-scanpackages failed; see $log"
}
