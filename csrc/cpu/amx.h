/* Products of 8 bit codes on Intel's AMX tiles: 16 queries by 16 columns by 64 numbers in one instruction. With
 * WKV_EMULATE_AMX the same in plain C, so that it can be tested on machines that have no tiles. */
#ifndef WHISPERKV_AMX_H
#define WHISPERKV_AMX_H
#include <stdint.h>
#include <string.h>

#include "simd.h"

enum { AMX_ROWS = 16, AMX_BYTES = 64 };

/* The tiles: each half of the queries has one for its sums and one for its codes; both share the one of the cache.
 * The instructions take numbers that the preprocessor knows. */
#define AMX_SUMS 0
#define AMX_MORE_SUMS 1
#define AMX_QUERIES 2
#define AMX_MORE_QUERIES 3
#define AMX_CACHE 4

struct amx_shape {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

INLINE struct amx_shape amx_shape(const int64_t queries) {
  struct amx_shape shape = {.palette = 1, .bytes[AMX_CACHE] = AMX_BYTES, .rows[AMX_CACHE] = AMX_ROWS};
  for (int half = 0; half < 2; half++) {
    const int64_t rows = least(queries - half * AMX_ROWS, AMX_ROWS);
    if (rows <= 0) break;
    shape.bytes[AMX_SUMS + half] = shape.bytes[AMX_QUERIES + half] = AMX_BYTES;
    shape.rows[AMX_SUMS + half] = shape.rows[AMX_QUERIES + half] = (uint8_t)rows;
  }
  return shape;
}

#ifndef WKV_EMULATE_AMX

#define amx_start(shape) _tile_loadconfig(shape)
#define amx_stop() _tile_release()
#define amx_clear(tile) _tile_zero(tile)
#define amx_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define amx_store(tile, to, stride) _tile_stored(tile, to, stride)
#define amx_multiply(sums, queries, cache) _tile_dpbsud(sums, queries, cache)

#else

static _Thread_local struct amx_shape amx_now;
static _Thread_local uint8_t amx_data[8][AMX_ROWS][AMX_BYTES];

static void amx_start(const struct amx_shape *const shape) { amx_now = *shape; }
static void amx_stop(void) { amx_now.palette = 0; }
static void amx_clear(const int tile) { memset(amx_data[tile], 0, sizeof amx_data[tile]); }

static void amx_load(const int tile, const void *const from, const int64_t stride) {
  amx_clear(tile);
  for (int row = 0; row < amx_now.rows[tile]; row++)
    memcpy(amx_data[tile][row], (const char *)from + row * stride, amx_now.bytes[tile]);
}

static void amx_store(const int tile, void *const to, const int64_t stride) {
  for (int row = 0; row < amx_now.rows[tile]; row++)
    memcpy((char *)to + row * stride, amx_data[tile][row], amx_now.bytes[tile]);
}

static void amx_multiply(const int sums, const int queries, const int cache) {
  for (int m = 0; m < amx_now.rows[sums]; m++) {
    uint32_t row[AMX_BYTES / 4];
    memcpy(row, amx_data[sums][m], sizeof row);
    for (int k = 0; k < AMX_BYTES; k++)
      for (int n = 0; n < AMX_BYTES / 4; n++)
        row[n] += (uint32_t)((int8_t)amx_data[queries][m][k] * amx_data[cache][k / 4][4 * n + k % 4]);
    memcpy(amx_data[sums][m], row, sizeof row);
  }
}

#endif

#endif
