#!/bin/sh
# Print the directory that holds `prometheus` and `promtool`: the ones on PATH, else the ones under
# build/tools/prometheus, else Debian's package, unpacked there. Needs no root, installs nothing:
#   "$(deploy/observability/fetch_prometheus.sh)/promtool" --version
set -eu

tools=$(cd "$(dirname "$0")/../.." && pwd)/build/tools
unpacked=$tools/prometheus/usr/bin

fail() {
  echo "error: $1; put prometheus and promtool 2.42 or newer (prometheus.io/download) on PATH" >&2
  exit 2
}

on_path=$(dirname "$(command -v promtool || echo /nowhere/promtool)")
if [ -x "$on_path/prometheus" ]; then
  echo "$on_path"
  exit
fi
if [ -x "$unpacked/promtool" ]; then
  echo "$unpacked"
  exit
fi
for tool in apt-get dpkg-deb; do
  command -v "$tool" >/dev/null || fail "no prometheus here, and no $tool to fetch it with"
done

mkdir -p "$tools"
work=$(mktemp -d "$tools/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial" "$work/download" "$work/package"
cd "$work/download"

# With package lists of its own where the system has none, or stale ones: only root may renew those.
if ! apt-get -q download prometheus >"$work/log" 2>&1; then
  own="-o Dir::State::Lists=$work/lists -o Dir::Cache=$work/cache -o APT::Sandbox::User="
  # shellcheck disable=SC2086 # several options
  { apt-get -q $own update && apt-get -q $own download prometheus; } >>"$work/log" 2>&1 || {
    cat "$work/log" >&2
    fail "Debian's package prometheus cannot be fetched (see above)"
  }
fi
dpkg-deb -x prometheus_*.deb "$work/package"
# Another process may have been quicker; its copy is as good.
mv -T "$work/package" "$tools/prometheus" 2>/dev/null || [ -x "$unpacked/promtool" ] ||
  fail "$tools/prometheus is in the way"
echo "$unpacked"
