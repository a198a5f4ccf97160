/* What an x86 CPU without VNNI can multiply and add at most: operands in registers, ten accumulators, nothing loaded.

       cc -O2 -pthread tools/avx2_peak.c -o avx2_peak && ./avx2_peak

   Three ways to a sum of products, 256 bits wide: float; int8 widened to pairs of int16 (exact); int8 as it is, added in
   pairs at 16 bits (saturates). For one thread and for two, the best of three runs. docs/performance.md reads it. */
#include <pthread.h>
#include <stdio.h>
#include <time.h>

#define LOOPS 40000000L
#define TEN(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9)
#define CLEAR(i) "vpxor %%ymm" #i ",%%ymm" #i ",%%ymm" #i "\n"
#define FLOATS(i) "vfmadd231ps %%ymm14,%%ymm15,%%ymm" #i "\n"
#define PAIRS(i) "vpmaddwd %%ymm14,%%ymm15,%%ymm10\nvpaddd %%ymm10,%%ymm" #i ",%%ymm" #i "\n"
#define BYTES(i) "vpmaddubsw %%ymm14,%%ymm15,%%ymm10\nvpmaddwd %%ymm10,%%ymm13,%%ymm10\nvpaddd %%ymm10,%%ymm" #i ",%%ymm" #i "\n"
#define USED "rcx", "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm13", "ymm14", "ymm15"
#define LOOP(name, STEP)                                                                                              \
    static void *name(void *unused)                                                                                    \
    {                                                                                                                  \
        __asm__ volatile(TEN(CLEAR) CLEAR(13) CLEAR(14) CLEAR(15) "mov %0,%%rcx\n1:\n" TEN(STEP) "dec %%rcx\njnz 1b\n" \
                         : : "r"(LOOPS) : USED);                                                                       \
        return unused;                                                                                                 \
    }
LOOP(floats, FLOATS)
LOOP(pairs, PAIRS)
LOOP(bytes, BYTES)

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

int main(void)
{
    struct { const char *name; void *(*run)(void *); int a_step; } ways[] = {
        {"float", floats, 8}, {"int8 as int16 pairs, exact", pairs, 16}, {"int8, saturating", bytes, 32}};
    for (int way = 0; way < 3; way++)
        for (int threads = 1; threads <= 2; threads++) {
            double best = 0;
            for (int turn = 0; turn < 3; turn++) {
                pthread_t running[2];
                double started = seconds();
                for (int i = 0; i < threads; i++) pthread_create(&running[i], 0, ways[way].run, 0);
                for (int i = 0; i < threads; i++) pthread_join(running[i], 0);
                double rate = 10.0 * LOOPS * threads * ways[way].a_step / (seconds() - started);
                best = rate > best ? rate : best;
            }
            printf("%-28s %d threads  %4.0f G multiply-adds a second\n", ways[way].name, threads, best / 1e9);
        }
    return 0;
}
