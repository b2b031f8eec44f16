/** Whether `anynode dev` serves the page, and may be told to take a node away. */
export const IS_DEV = document.querySelector('meta[name="anynode-dev"]') !== null;
