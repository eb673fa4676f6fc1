/* What the library shows: names with the prefix `gpt2core_`. Every other function is static. */

#ifndef GPT2CORE_EXPORT_H
#define GPT2CORE_EXPORT_H

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#endif
