// Stands in for packages that the page does without (vite.config.ts).
export default function nothing(): void {}

export const twMerge = (...classes: unknown[]): string => classes.filter(Boolean).join(' ');
