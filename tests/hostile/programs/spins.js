// expect: timeout|cpuLimit
for (;;);
