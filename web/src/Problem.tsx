interface Props {
  error: Error;
  retry: () => Promise<void>;
  edit?: (() => void) | undefined;
}

export function Problem({ error, retry, edit }: Props) {
  return (
    <div className="problem box" role="alert">
      <p>{error.message}</p>
      <button type="button" onClick={() => void retry()}>
        Try again
      </button>
      {edit && (
        <button type="button" onClick={edit}>
          Edit the message
        </button>
      )}
    </div>
  );
}
