#!/usr/bin/env bash
# Debian packages that the tests and the demo can use, and why. Nothing else is installed outside .venv.
#   mricron-data   Colin27: one real person's MR, scored as a real external subject of brain-tissue
set -uo pipefail
packages=(mricron-data)
missing=()
for name in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q "ok installed" || missing+=("$name")
done
[ ${#missing[@]} -eq 0 ] && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
  echo "NOT INSTALLED: ${missing[*]}. Without root and apt-get, Colin27 is absent, and the reports say so." >&2
  exit 0
fi
echo "installing ${missing[*]} (see deploy/debian.sh for the reasons)" >&2
export DEBIAN_FRONTEND=noninteractive
timeout 120 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 ||
  { timeout 120 apt-get update -qq >/dev/null 2>&1 &&
    timeout 120 apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1; } ||
  echo "NOT INSTALLED: ${missing[*]}, since apt-get failed. Colin27 is absent, and the reports say so." >&2
exit 0
