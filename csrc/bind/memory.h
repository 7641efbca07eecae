/* What the bindings ask of any array, whosever it is. */
#ifndef WHISPERKV_MEMORY_H
#define WHISPERKV_MEMORY_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Numbers in one array, also in one that repeats a few: what is reckoned from sizes then fits 64 bits. */
#define MOST_NUMBERS ((int64_t)1 << 48)

/* As many as the sides say, an empty one aside; more than MOST_NUMBERS if they are too many. */
static inline int64_t numbers_in(const int64_t *const sizes, const int64_t dim) {
  int64_t numbers = 1;
  for (int64_t d = 0; d < dim && numbers <= MOST_NUMBERS; d++)
    if (sizes[d] > 0) numbers = sizes[d] > MOST_NUMBERS / numbers ? MOST_NUMBERS + 1 : numbers * sizes[d];
  return numbers;
}

/* Memory that an op reads or writes. */
struct memory {
  const void *data;
  size_t bytes;
};

static inline bool overlap(const struct memory a, const struct memory b) {
  return a.bytes && b.bytes && (uintptr_t)a.data < (uintptr_t)b.data + b.bytes &&
         (uintptr_t)b.data < (uintptr_t)a.data + a.bytes;
}

#endif
