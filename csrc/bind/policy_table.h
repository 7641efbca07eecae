/* The policies by number, for the checks of both bindings and for Python. */
#ifndef WHISPERKV_POLICY_TABLE_H
#define WHISPERKV_POLICY_TABLE_H
#include <stdbool.h>

#include "../policies.h"

#define POLICY_ENTRY(name, reads_attention, reads_key_norm) {#name, reads_attention, reads_key_norm},
static const struct {
  const char *name;
  bool reads_attention, reads_key_norm;
} policies[] = {WKV_POLICIES(POLICY_ENTRY)};

enum { POLICIES = sizeof policies / sizeof policies[0] };

#endif
